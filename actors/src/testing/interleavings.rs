//! Interleavings: every primitive behind [`crate::sync`] under shuttle's schedulers.
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" cargo test -p kv-cache-actors --lib --release shuttle
//! KV_SCHEDULES=5000000 RUSTFLAGS="--cfg shuttle" cargo test …        # all tests together
//! ```
//!
//! What is claimed: permits, replies that are joined, slots, and a small model of submitter → queue → worker built from
//! them. What is not: crossbeam and tokio channels and the actors' threads (the queue here is a mutex and a condition
//! variable). A schedule in which somebody waits for ever is a deadlock to shuttle, and fails the test.

use std::collections::VecDeque;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use shuttle::future::block_on;
use shuttle::sync::Condvar;
use shuttle::thread;

use crate::batch::{BatchCacheOperations, Outcome};
use crate::error::Error;
use crate::permit::{Amount, Permit, Permits};
use crate::reply::{Answer, Join, PartReply, Reply, Unanswered};
use crate::sequence::SequenceId;
use crate::slot::{SlotId, SlotTable};
use crate::submission::Submission;
use crate::sync::{Arc, AtomicU64, Mutex, Ordering, lock};

/// Schedules of all tests together, unless `KV_SCHEDULES` says otherwise.
const SCHEDULES: usize = 800_000;

/// Tests that share them.
const TESTS: usize = 8;

/// Half of the schedules at random, half by probabilistic concurrency testing (Burckhardt et al., 2010), which finds bugs of
/// few ordering constraints with a known probability.
fn check(test: impl Fn() + Send + Sync + Clone + 'static) {
    let all =
        std::env::var("KV_SCHEDULES").map_or(SCHEDULES, |n| n.parse().expect("KV_SCHEDULES is a number"));
    shuttle::check_random(test.clone(), all / TESTS / 2);
    shuttle::check_pct(test, all / TESTS / 2, 3);
}

fn jobs(jobs: u64) -> Amount {
    Amount { jobs, bytes: 0 }
}

/// Nothing is taken, and whoever comes now need not wait.
fn assert_all_free(permits: &Permits) {
    assert_eq!(permits.used(), jobs(0));
    assert!(permits.try_acquire(permits.limit()).is_ok(), "refused, but all is free");
}

/// Polls once, without ever being woken.
fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn shuttle_permits_are_never_overdrawn_and_all_come_back() {
    check(|| {
        let permits = Permits::new(jobs(3));
        let held = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (1..=3)
            .map(|wanted| {
                let (permits, held) = (permits.clone(), held.clone());
                thread::spawn(move || {
                    for _ in 0..2 {
                        let permit = block_on(permits.acquire(jobs(wanted))).expect("nobody closes");
                        let now = held.fetch_add(wanted, Ordering::SeqCst) + wanted;
                        assert!(now <= 3, "{now} of 3 given out");
                        held.fetch_sub(wanted, Ordering::SeqCst);
                        drop(permit);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().expect("it ends"));
        assert_all_free(&permits);
    });
}

#[test]
fn shuttle_nobody_overtakes_somebody_who_waits() {
    check(|| {
        let permits = Permits::new(jobs(3));
        let held = permits.try_acquire(jobs(2)).expect("it is free");
        let mut large = Box::pin(permits.acquire(jobs(3)));
        assert!(poll(large.as_mut()).is_pending());
        let large_has_it = Arc::new(AtomicU64::new(0));
        let small: Vec<_> = (0..2)
            .map(|turn| {
                let (permits, large_has_it) = (permits.clone(), large_has_it.clone());
                thread::spawn(move || {
                    let permit = match turn {
                        0 => block_on(permits.acquire(jobs(1))).ok(),
                        _ => permits.try_acquire(jobs(1)).ok(),
                    };
                    // One job is free all the time, but somebody who came earlier waits for more.
                    assert!(permit.is_none() || large_has_it.load(Ordering::SeqCst) == 1, "it was overtaken");
                })
            })
            .collect();
        let giver = thread::spawn(move || drop(held));
        let permit = block_on(large).expect("nobody closes");
        large_has_it.store(1, Ordering::SeqCst);
        drop(permit);
        small.into_iter().chain([giver]).for_each(|thread| thread.join().expect("it ends"));
        assert_all_free(&permits);
    });
}

#[test]
fn shuttle_a_waiter_who_gives_up_leaks_nothing_and_blocks_nobody() {
    check(|| {
        let permits = Permits::new(jobs(2));
        let held = permits.try_acquire(jobs(1)).expect("it is free");
        let owner = permits.clone();
        let mut quitter = Box::pin(async move { owner.acquire(jobs(2)).await });
        assert!(poll(quitter.as_mut()).is_pending());
        let waiters: Vec<_> = (1..=2)
            .map(|wanted| {
                let permits = permits.clone();
                thread::spawn(move || drop(block_on(permits.acquire(jobs(wanted))).expect("nobody closes")))
            })
            .collect();
        // It may be granted at this very moment, and never learn of it.
        let quits = thread::spawn(move || drop(quitter));
        drop(held);
        waiters.into_iter().chain([quits]).for_each(|thread| thread.join().expect("it ends"));
        assert_all_free(&permits);
    });
}

#[test]
fn shuttle_closing_refuses_those_who_wait_and_idle_sees_the_last_permit_go() {
    check(|| {
        let permits = Permits::new(jobs(1));
        let held = permits.try_acquire(jobs(1)).expect("it is free");
        let mut threads: Vec<_> = (0..2)
            .map(|_| {
                let permits = permits.clone();
                thread::spawn(move || match block_on(permits.acquire(jobs(1))) {
                    Ok(permit) => drop(permit),
                    Err(error) => assert_eq!(error, Error::Closed),
                })
            })
            .collect();
        threads.push(thread::spawn(move || drop(held)));
        permits.close();
        block_on(permits.idle());
        assert!(matches!(permits.try_acquire(jobs(1)), Err(Error::Closed)));
        threads.into_iter().for_each(|thread| thread.join().expect("it ends"));
        block_on(permits.idle());
        assert_eq!(permits.used(), jobs(0));
    });
}

#[test]
fn shuttle_parts_of_a_submission_are_joined_once_whoever_dies() {
    check(|| {
        let permits = Permits::new(jobs(4));
        let permit = permits.try_acquire(jobs(4)).expect("it is free");
        let (reply, answer) = Reply::new();
        let join = Join::new(4, reply, Some(permit));
        let threads: Vec<_> = [vec![3, 0], vec![1], vec![2]]
            .into_iter()
            .zip(0..)
            .map(|(places, shard)| {
                let results = places.iter().map(|_| Ok(Outcome::Closed)).collect();
                let part = PartReply::new(join.clone(), places, shard);
                thread::spawn(move || match shard {
                    1 => drop(part),
                    _ => part.send(results),
                })
            })
            .collect();
        drop(join);
        let results = block_on(answer).expect("the last part answers");
        assert_eq!(permits.used(), jobs(0), "whoever has the answer finds the permit free");
        let lost: Vec<bool> =
            results.iter().map(|result| matches!(result, Err(Error::ShardLost { .. }))).collect();
        assert_eq!(lost, [false, true, false, false]);
        threads.into_iter().for_each(|thread| thread.join().expect("it ends"));
    });
}

#[test]
fn shuttle_a_pinned_slot_keeps_its_content() {
    check(|| {
        let table = SlotTable::new(1);
        let content = Arc::new(AtomicU64::new(0));
        let slot = table.first(SlotId(0)).fill();
        // What readers are shown: the generation.
        let shown = Arc::new(Mutex::new(slot.generation()));
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let (table, content, shown) = (table.clone(), content.clone(), shown.clone());
                thread::spawn(move || {
                    let generation = *lock(&shown);
                    if let Some(pin) = table.pin(SlotId(0), generation) {
                        for _ in 0..2 {
                            assert_eq!(
                                content.load(Ordering::SeqCst),
                                u64::from(generation.0),
                                "read as another's"
                            );
                        }
                        drop(pin);
                    }
                })
            })
            .collect();
        let mut slot = slot;
        for _ in 0..3 {
            slot = match table.vacate(slot) {
                Err(pinned) => pinned,
                Ok(vacant) => {
                    let next = vacant.fill();
                    content.store(next.generation().0.into(), Ordering::SeqCst);
                    *lock(&shown) = next.generation();
                    next
                }
            };
        }
        readers.into_iter().for_each(|thread| thread.join().expect("it ends"));
        assert!(table.vacate(slot).is_ok(), "every pin was given back");
    });
}

/// A queue that a worker takes submissions from.
#[derive(Default)]
struct Mailbox {
    state: Mutex<MailboxState>,
    changed: Condvar,
}

#[derive(Default)]
struct MailboxState {
    queue: VecDeque<Box<Submission>>,
    most: usize,
    ended: bool,
    dead: bool,
}

impl Mailbox {
    /// Sends; the permit rides in the submission, so the queue has room. If the worker is dead, it is dropped.
    fn send(&self, permit: Permit) -> Answer {
        let (reply, answer) = Reply::new();
        let mut batch = BatchCacheOperations::new();
        batch.close(SequenceId::from_u64(7));
        let submission = Submission::new(batch, Some(permit), Some(reply), None);
        let mut state = lock(&self.state);
        if !state.dead {
            state.queue.push_back(submission);
            state.most = state.most.max(state.queue.len());
            self.changed.notify_one();
        }
        answer
    }

    /// The worker: answers until the mailbox ends, or dies before submission `dies_at`, with whatever is queued.
    fn work(&self, dies_at: usize) {
        for turn in 0.. {
            let mut state = lock(&self.state);
            while state.queue.is_empty() && !state.ended {
                state = self.changed.wait(state).expect("nobody panics");
            }
            if turn == dies_at {
                state.dead = true;
                let dropped = std::mem::take(&mut state.queue);
                drop(state);
                return drop(dropped);
            }
            let Some(submission) = state.queue.pop_front() else { return };
            drop(state);
            submission.refuse(&Error::Empty);
        }
    }

    fn end(&self) {
        lock(&self.state).ended = true;
        self.changed.notify_all();
    }
}

/// Three callers, a limit of two: one waits for its answer, one gives up at once, one gives up after a look.
fn callers(permits: &Permits, mailbox: &Arc<Mailbox>) -> Vec<thread::JoinHandle<()>> {
    (0..3)
        .map(|patience| {
            let (permits, mailbox) = (permits.clone(), mailbox.clone());
            thread::spawn(move || {
                let Ok(permit) = block_on(permits.acquire(jobs(1))) else { return };
                let answer = mailbox.send(permit);
                match patience {
                    0 => match block_on(answer) {
                        Ok(results) => assert!(matches!(results[..], [Err(Error::Empty)])),
                        Err(Unanswered) => assert!(lock(&mailbox.state).dead, "only the dead do not answer"),
                    },
                    1 => drop(answer),
                    _ => drop(poll(pin!(answer))),
                }
            })
        })
        .collect()
}

#[test]
fn shuttle_shutdown_waits_for_what_was_permitted_and_refuses_the_rest() {
    check(|| {
        let (permits, mailbox) = (Permits::new(jobs(2)), Arc::new(Mailbox::default()));
        let worker = {
            let mailbox = mailbox.clone();
            thread::spawn(move || mailbox.work(usize::MAX))
        };
        let callers = callers(&permits, &mailbox);
        // Shutdown: nobody new, wait for the rest, then end.
        permits.close();
        block_on(permits.idle());
        assert!(lock(&mailbox.state).queue.is_empty(), "what was permitted was answered");
        mailbox.end();
        callers.into_iter().chain([worker]).for_each(|thread| thread.join().expect("it ends"));
        assert!(lock(&mailbox.state).most <= 2, "never more queued than permitted");
        assert_eq!(permits.used(), jobs(0));
    });
}

#[test]
fn shuttle_a_worker_that_dies_leaves_nobody_waiting_and_no_permit_behind() {
    check(|| {
        let (permits, mailbox) = (Permits::new(jobs(2)), Arc::new(Mailbox::default()));
        let worker = {
            let mailbox = mailbox.clone();
            thread::spawn(move || mailbox.work(1))
        };
        let callers = callers(&permits, &mailbox);
        callers.into_iter().for_each(|thread| thread.join().expect("it ends"));
        mailbox.end();
        worker.join().expect("it ends");
        block_on(permits.idle());
        assert_all_free(&permits);
    });
}
