//! Permits: how many operations and bytes may be in flight, and who waits for them.
//!
//! A permit is taken before anything is sent and rides in the message, so a queue can never hold more than was permitted
//! and whoever drops the message, finished or not, gives the permit back. Waiters are served in arrival order: a large
//! request cannot be starved by small ones that come after it.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::task::{Context, Poll, Waker};

use crate::error::Error;
use crate::sync::{Arc, AtomicU64, Mutex, Ordering, lock};

/// A budget of operations (`jobs`) and bytes.
///
/// Taking and giving back is one compare-and-swap while nobody waits: every operation of a cache passes here twice, on two
/// threads, and a lock would put one of them to sleep. Whoever has to wait sets a flag in the same word, which sends
/// everybody to the queue behind the lock until it is empty.
#[derive(Debug, Clone)]
pub struct Permits {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    limit: Amount,
    /// What is taken, and the flags.
    word: AtomicU64,
    state: Mutex<State>,
}

/// So many operations and so many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Amount {
    /// Operations.
    pub jobs: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Amount {
    /// The most that a budget can have: what fits in one word beside two flags.
    pub const MAX: Amount = Amount { jobs: (1 << 22) - 1, bytes: BYTES };

    fn word(self) -> u64 {
        self.jobs << JOBS_AT | self.bytes
    }
}

/// `closed | waited for | jobs (22 bits) | bytes (40 bits)`.
const CLOSED: u64 = 1 << 63;
const WAITED_FOR: u64 = 1 << 62;
const JOBS_AT: u32 = 40;
const BYTES: u64 = (1 << JOBS_AT) - 1;

fn used(word: u64) -> Amount {
    Amount { jobs: (word & !(CLOSED | WAITED_FOR)) >> JOBS_AT, bytes: word & BYTES }
}

#[derive(Debug, Default)]
struct State {
    next_ticket: u64,
    /// Tickets not yet granted, in arrival order. Those who gave up are skipped when they reach the front, which is
    /// therefore always somebody who waits.
    queue: VecDeque<u64>,
    waiters: HashMap<u64, Waiter>,
    idle: Vec<Waker>,
}

#[derive(Debug)]
struct Waiter {
    amount: Amount,
    granted: bool,
    waker: Option<Waker>,
}

impl Shared {
    /// Takes `amount` if it fits, and returns the word that decided. With `obey`, flags refuse it.
    fn take(&self, amount: Amount, obey: u64) -> Result<(), u64> {
        let mut word = self.word.load(Ordering::Acquire);
        loop {
            let used = used(word);
            let fits =
                used.jobs + amount.jobs <= self.limit.jobs && used.bytes + amount.bytes <= self.limit.bytes;
            if word & obey != 0 || !fits {
                return Err(word);
            }
            match self.word.compare_exchange_weak(
                word,
                word + amount.word(),
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Ok(()),
                Err(now) => word = now,
            }
        }
    }

    fn give_back(&self, amount: Amount) {
        let before = self.word.fetch_sub(amount.word(), Ordering::AcqRel);
        if before & WAITED_FOR != 0 {
            let wake = self.grant(&mut lock(&self.state));
            // Outside of the lock: a waker may run arbitrary code.
            wake.into_iter().for_each(Waker::wake);
        }
    }

    /// Grants from the front as long as the front fits, and returns whom to wake.
    ///
    /// Whoever waits has set the flag before it looked at what is taken, and whoever gives back looks at the flag in the
    /// same step: one of the two sees the other. The flag goes when nobody is left to wait.
    fn grant(&self, state: &mut State) -> Vec<Waker> {
        let mut wake = Vec::new();
        while let Some(ticket) = state.queue.front() {
            let Some(waiter) = state.waiters.get_mut(ticket) else {
                state.queue.pop_front();
                continue;
            };
            // After closing, nobody is let in any more, not even those who have not noticed yet.
            if self.take(waiter.amount, CLOSED).is_err() {
                break;
            }
            waiter.granted = true;
            wake.extend(waiter.waker.take());
            state.queue.pop_front();
        }
        if used(self.word.load(Ordering::Acquire)) == Amount::default() {
            wake.append(&mut state.idle);
        }
        if state.queue.is_empty() && state.idle.is_empty() {
            self.word.fetch_and(!WAITED_FOR, Ordering::AcqRel);
        }
        wake
    }
}

impl Permits {
    /// A budget of `limit`, or of [`Amount::MAX`] where that is less.
    pub fn new(limit: Amount) -> Self {
        let limit =
            Amount { jobs: limit.jobs.min(Amount::MAX.jobs), bytes: limit.bytes.min(Amount::MAX.bytes) };
        let shared = Shared { limit, word: AtomicU64::new(0), state: Mutex::new(State::default()) };
        Permits { shared: Arc::new(shared) }
    }

    /// The whole budget.
    pub fn limit(&self) -> Amount {
        self.shared.limit
    }

    /// What is taken.
    pub fn used(&self) -> Amount {
        used(self.shared.word.load(Ordering::Acquire))
    }

    fn check_size(&self, amount: Amount) -> Result<(), Error> {
        let limit = self.shared.limit;
        if amount.jobs > limit.jobs || amount.bytes > limit.bytes {
            let Amount { jobs, bytes } = amount;
            return Err(Error::BatchTooLarge { jobs, bytes, jobs_max: limit.jobs, bytes_max: limit.bytes });
        }
        Ok(())
    }

    fn permit(&self, amount: Amount) -> Permit {
        Permit { shared: self.shared.clone(), amount }
    }

    /// Takes `amount` now, or says why not. Never overtakes somebody who waits.
    ///
    /// # Errors
    /// [`Error::BatchTooLarge`], [`Error::Closed`], [`Error::Overloaded`].
    pub fn try_acquire(&self, amount: Amount) -> Result<Permit, Error> {
        self.check_size(amount)?;
        match self.shared.take(amount, CLOSED | WAITED_FOR) {
            Ok(()) => Ok(self.permit(amount)),
            Err(word) if word & CLOSED != 0 => Err(Error::Closed),
            Err(word) => {
                let (limit, used) = (self.shared.limit, used(word));
                Err(Error::Overloaded {
                    jobs: amount.jobs,
                    bytes: amount.bytes,
                    jobs_free: limit.jobs - used.jobs,
                    bytes_free: limit.bytes - used.bytes,
                })
            }
        }
    }

    /// Waits for `amount`. Dropping the future gives up the place in the queue, and the permit if it was granted meanwhile.
    ///
    /// # Errors
    /// [`Error::BatchTooLarge`], [`Error::Closed`] (also while waiting).
    pub async fn acquire(&self, amount: Amount) -> Result<Permit, Error> {
        match self.try_acquire(amount) {
            Err(Error::Overloaded { .. }) => {}
            answered => return answered,
        }
        let mut place = Place { shared: self.shared.clone(), amount, ticket: None };
        poll_fn(move |context| place.poll(context)).await
    }

    /// Refuses everybody from now on, those who wait included. What was permitted stays so.
    pub fn close(&self) {
        let wake: Vec<Waker> = {
            let mut state = lock(&self.shared.state);
            self.shared.word.fetch_or(CLOSED, Ordering::AcqRel);
            state.waiters.values_mut().filter_map(|waiter| waiter.waker.take()).collect()
        };
        wake.into_iter().for_each(Waker::wake);
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        self.shared.word.load(Ordering::Acquire) & CLOSED != 0
    }

    /// Waits until nothing is taken.
    pub async fn idle(&self) {
        poll_fn(|context| {
            let mut state = lock(&self.shared.state);
            let word = self.shared.word.fetch_or(WAITED_FOR, Ordering::AcqRel);
            if used(word) == Amount::default() {
                if state.queue.is_empty() && state.idle.is_empty() {
                    self.shared.word.fetch_and(!WAITED_FOR, Ordering::AcqRel);
                }
                return Poll::Ready(());
            }
            state.idle.push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// A place in the queue of waiters.
struct Place {
    shared: Arc<Shared>,
    amount: Amount,
    ticket: Option<u64>,
}

impl Place {
    fn permit(&mut self) -> Poll<Result<Permit, Error>> {
        self.ticket = None;
        Poll::Ready(Ok(Permit { shared: self.shared.clone(), amount: self.amount }))
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<Permit, Error>> {
        let shared = self.shared.clone();
        let mut state = lock(&shared.state);
        // Before looking at what is taken: see `grant`.
        let closed = shared.word.fetch_or(WAITED_FOR, Ordering::AcqRel) & CLOSED != 0;
        let Some(ticket) = self.ticket else {
            if closed {
                let wake = shared.grant(&mut state);
                drop(state);
                wake.into_iter().for_each(Waker::wake);
                return Poll::Ready(Err(Error::Closed));
            }
            let ticket = state.next_ticket;
            state.next_ticket += 1;
            state.queue.push_back(ticket);
            state.waiters.insert(ticket, Waiter { amount: self.amount, granted: false, waker: None });
            self.ticket = Some(ticket);
            // It may fit by now: then it is granted at once.
            let wake = shared.grant(&mut state);
            let answer = match state.waiters.get_mut(&ticket) {
                Some(waiter) if !waiter.granted => {
                    waiter.waker = Some(context.waker().clone());
                    Poll::Pending
                }
                _ => {
                    state.waiters.remove(&ticket);
                    self.permit()
                }
            };
            drop(state);
            wake.into_iter().for_each(Waker::wake);
            return answer;
        };
        let Some(waiter) = state.waiters.get_mut(&ticket) else { return Poll::Ready(Err(Error::Closed)) };
        if !waiter.granted && !closed {
            waiter.waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        let granted = waiter.granted;
        state.waiters.remove(&ticket);
        self.ticket = None;
        let wake = shared.grant(&mut state);
        drop(state);
        wake.into_iter().for_each(Waker::wake);
        if granted { self.permit() } else { Poll::Ready(Err(Error::Closed)) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let wake = {
            let mut state = lock(&self.shared.state);
            let Some(waiter) = state.waiters.remove(&ticket) else { return };
            if waiter.granted {
                self.shared.word.fetch_sub(self.amount.word(), Ordering::AcqRel);
            }
            // Also when it was not granted: it may have stood before others that fit.
            self.shared.grant(&mut state)
        };
        wake.into_iter().for_each(Waker::wake);
    }
}

/// Part of a budget, given back when dropped.
#[derive(Debug)]
#[must_use]
pub struct Permit {
    shared: Arc<Shared>,
    amount: Amount,
}

impl Permit {
    /// Adds another permit to this one, to be given back in one step. Permits of another budget are given back now.
    pub(crate) fn absorb(&mut self, mut other: Permit) {
        if Arc::ptr_eq(&self.shared, &other.shared) {
            let Amount { jobs, bytes } = std::mem::take(&mut other.amount);
            self.amount.jobs += jobs;
            self.amount.bytes += bytes;
        }
    }

    /// Cuts `jobs` jobs off into a permit of their own; none if it has fewer.
    pub fn split(&mut self, jobs: u64) -> Option<Permit> {
        self.amount.jobs = self.amount.jobs.checked_sub(jobs)?;
        Some(Permit { shared: self.shared.clone(), amount: Amount { jobs, bytes: 0 } })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.amount != Amount::default() {
            self.shared.give_back(self.amount);
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;

    fn jobs(jobs: u64) -> Amount {
        Amount { jobs, bytes: 0 }
    }

    fn poll<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
        std::pin::Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn a_large_request_is_not_starved_by_small_ones() {
        let permits = Permits::new(jobs(4));
        let held = permits.try_acquire(jobs(3)).unwrap();
        let mut large = pin!(permits.acquire(jobs(4)));
        assert!(poll(&mut large).is_pending());
        assert!(matches!(permits.try_acquire(jobs(1)), Err(Error::Overloaded { jobs_free: 1, .. })));
        drop(held);
        assert!(matches!(poll(&mut large), Poll::Ready(Ok(_))));
    }

    #[test]
    fn a_dropped_waiter_lets_the_next_one_in_and_leaks_nothing() {
        let permits = Permits::new(jobs(4));
        let held = permits.try_acquire(jobs(2)).unwrap();
        let mut small = Box::pin(permits.acquire(jobs(2)));
        {
            let mut large = Box::pin(permits.acquire(jobs(3)));
            assert!(poll(&mut large).is_pending());
            assert!(poll(&mut small).is_pending(), "stands behind the large one");
        }
        assert!(matches!(poll(&mut small), Poll::Ready(Ok(_))));
        // Granted, but never polled again: the drop gives it back.
        let mut third = Box::pin(permits.acquire(jobs(4)));
        assert!(poll(&mut third).is_pending());
        drop(held);
        drop(small);
        drop(third);
        assert_eq!(permits.used(), Amount::default());
    }

    #[test]
    fn closing_refuses_those_who_wait() {
        let permits = Permits::new(jobs(1));
        let held = permits.try_acquire(jobs(1)).unwrap();
        let mut waiting = pin!(permits.acquire(jobs(1)));
        assert!(poll(&mut waiting).is_pending());
        permits.close();
        assert!(matches!(poll(&mut waiting), Poll::Ready(Err(Error::Closed))));
        let mut idle = pin!(permits.idle());
        assert!(poll(&mut idle).is_pending());
        drop(held);
        assert!(poll(&mut idle).is_ready());
    }

    #[test]
    fn what_can_never_fit_is_refused_with_the_numbers() {
        let permits = Permits::new(Amount { jobs: 2, bytes: 10 });
        let error = permits.try_acquire(Amount { jobs: 1, bytes: 11 }).unwrap_err();
        assert_eq!(error, Error::BatchTooLarge { jobs: 1, bytes: 11, jobs_max: 2, bytes_max: 10 });
    }
}
