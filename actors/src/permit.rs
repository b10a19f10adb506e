//! Permits: how many operations and bytes may be in flight, and who waits for them.
//!
//! A permit is taken before anything is sent and rides in the message, so a queue can never hold more than was permitted
//! and whoever drops the message, finished or not, gives the permit back. Waiters are served in arrival order: a large
//! request cannot be starved by small ones that come after it.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::task::{Context, Poll, Waker};

use crate::error::Error;
use crate::sync::{Arc, Mutex, lock};

/// A budget of operations (`jobs`) and bytes.
#[derive(Debug, Clone)]
pub struct Permits {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    limit: Amount,
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

#[derive(Debug, Default)]
struct State {
    used: Amount,
    closed: bool,
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

impl State {
    fn fits(&self, limit: Amount, amount: Amount) -> bool {
        self.used.jobs + amount.jobs <= limit.jobs && self.used.bytes + amount.bytes <= limit.bytes
    }

    fn take(&mut self, amount: Amount) {
        self.used.jobs += amount.jobs;
        self.used.bytes += amount.bytes;
    }

    /// Grants from the front as long as the front fits, and returns whom to wake.
    fn grant(&mut self, limit: Amount) -> Vec<Waker> {
        let mut wake = Vec::new();
        while let Some(ticket) = self.queue.front() {
            let Some(waiter) = self.waiters.get(ticket) else {
                self.queue.pop_front();
                continue;
            };
            let amount = waiter.amount;
            if !self.fits(limit, amount) {
                break;
            }
            self.take(amount);
            if let Some(waiter) = self.queue.pop_front().and_then(|ticket| self.waiters.get_mut(&ticket)) {
                waiter.granted = true;
                wake.extend(waiter.waker.take());
            }
        }
        if self.used == Amount::default() {
            wake.append(&mut self.idle);
        }
        wake
    }
}

impl Permits {
    /// A budget of `limit`.
    pub fn new(limit: Amount) -> Self {
        Permits { shared: Arc::new(Shared { limit, state: Mutex::new(State::default()) }) }
    }

    /// The whole budget.
    pub fn limit(&self) -> Amount {
        self.shared.limit
    }

    /// What is taken.
    pub fn used(&self) -> Amount {
        lock(&self.shared.state).used
    }

    fn check_size(&self, amount: Amount) -> Result<(), Error> {
        let limit = self.shared.limit;
        if amount.jobs > limit.jobs || amount.bytes > limit.bytes {
            let Amount { jobs, bytes } = amount;
            return Err(Error::BatchTooLarge { jobs, bytes, jobs_max: limit.jobs, bytes_max: limit.bytes });
        }
        Ok(())
    }

    /// Takes `amount` now, or says why not. Never overtakes somebody who waits.
    ///
    /// # Errors
    /// [`Error::BatchTooLarge`], [`Error::Closed`], [`Error::Overloaded`].
    pub fn try_acquire(&self, amount: Amount) -> Result<Permit, Error> {
        self.check_size(amount)?;
        let limit = self.shared.limit;
        let mut state = lock(&self.shared.state);
        if state.closed {
            return Err(Error::Closed);
        }
        if !state.queue.is_empty() || !state.fits(limit, amount) {
            return Err(Error::Overloaded {
                jobs: amount.jobs,
                bytes: amount.bytes,
                jobs_free: limit.jobs - state.used.jobs,
                bytes_free: limit.bytes - state.used.bytes,
            });
        }
        state.take(amount);
        Ok(Permit { shared: self.shared.clone(), amount })
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
            state.closed = true;
            state.waiters.values_mut().filter_map(|waiter| waiter.waker.take()).collect()
        };
        wake.into_iter().for_each(Waker::wake);
    }

    /// Waits until nothing is taken.
    pub async fn idle(&self) {
        poll_fn(|context| {
            let mut state = lock(&self.shared.state);
            if state.used == Amount::default() {
                return Poll::Ready(());
            }
            state.idle.push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

impl Shared {
    fn give_back(&self, amount: Amount) {
        let wake = {
            let mut state = lock(&self.state);
            state.used.jobs -= amount.jobs;
            state.used.bytes -= amount.bytes;
            if state.queue.is_empty() && state.idle.is_empty() {
                return;
            }
            state.grant(self.limit)
        };
        // Outside of the lock: a waker may run arbitrary code.
        wake.into_iter().for_each(Waker::wake);
    }
}

/// A place in the queue of waiters.
struct Place {
    shared: Arc<Shared>,
    amount: Amount,
    ticket: Option<u64>,
}

impl Place {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<Permit, Error>> {
        let shared = self.shared.clone();
        let mut state = lock(&shared.state);
        let Some(ticket) = self.ticket else {
            if state.closed {
                return Poll::Ready(Err(Error::Closed));
            }
            // A permit may have come back between `try_acquire` and here.
            if state.queue.is_empty() && state.fits(shared.limit, self.amount) {
                state.take(self.amount);
                return Poll::Ready(Ok(Permit { shared: self.shared.clone(), amount: self.amount }));
            }
            let ticket = state.next_ticket;
            state.next_ticket += 1;
            let waker = Some(context.waker().clone());
            state.queue.push_back(ticket);
            state.waiters.insert(ticket, Waiter { amount: self.amount, granted: false, waker });
            self.ticket = Some(ticket);
            return Poll::Pending;
        };
        let closed = state.closed;
        let Some(waiter) = state.waiters.get_mut(&ticket) else { return Poll::Ready(Err(Error::Closed)) };
        if !waiter.granted && !closed {
            waiter.waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        let granted = waiter.granted;
        state.waiters.remove(&ticket);
        self.ticket = None;
        if granted {
            Poll::Ready(Ok(Permit { shared: self.shared.clone(), amount: self.amount }))
        } else {
            Poll::Ready(Err(Error::Closed))
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let wake = {
            let mut state = lock(&self.shared.state);
            let Some(waiter) = state.waiters.remove(&ticket) else { return };
            if waiter.granted {
                state.used.jobs -= self.amount.jobs;
                state.used.bytes -= self.amount.bytes;
            }
            // Also when it was not granted: it may have stood before others that fit.
            state.grant(self.shared.limit)
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
