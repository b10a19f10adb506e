//! The usher: a task of the executor that hands out answers which come in crowds.
//!
//! Waking a task costs several times more from a thread of our own, which has to pass the executor's shared queue, than from one of
//! the executor's workers. A device actor that answers a few operations does it itself: the hop here would be all that the callers
//! notice. One that answers hundreds would do little else.

use tokio::sync::mpsc;

use crate::submission::Submissions;

/// Fewer answers are given by whoever has them.
const CROWD_MIN: usize = 64;
/// Answers given before other tasks get a turn.
const TURN_MAX: usize = 1024;

/// The way to the usher.
///
/// The channel is unbounded and holds no more than can be under way: an answer keeps its permit until it is given (one of several parts leaves it to
/// the last), and closes by drop, which have none, are as many as sequences at most.
#[derive(Debug, Clone)]
pub(crate) struct UsherHandle(mpsc::UnboundedSender<Submissions>);

/// The usher before it runs. Dropped with its executor, it gives what is left: nobody waits in vain.
pub(crate) struct Usher {
    crowds: mpsc::UnboundedReceiver<Submissions>,
    /// The crowd that is being answered.
    crowd: Submissions,
}

/// An usher, and the way to it.
pub(crate) fn usher() -> (UsherHandle, Usher) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (UsherHandle(sender), Usher { crowds: receiver, crowd: Vec::new() })
}

impl UsherHandle {
    /// Has all answers given, in their order, and leaves the list empty.
    pub(crate) fn give(&self, answers: &mut Submissions) {
        if answers.len() < CROWD_MIN {
            return give(answers);
        }
        // An error means that the executor has ended, and took the usher along.
        if let Err(mpsc::error::SendError(mut back)) = self.0.send(std::mem::take(answers)) {
            give(&mut back);
        }
    }
}

impl Usher {
    /// Ends when no device actor is left.
    pub(crate) async fn run(mut self) {
        while let Some(crowd) = self.crowds.recv().await {
            self.crowd = crowd;
            while !self.crowd.is_empty() {
                let rest = self.crowd.split_off(TURN_MAX.min(self.crowd.len()));
                give(&mut self.crowd);
                self.crowd = rest;
                if !self.crowd.is_empty() {
                    tokio::task::yield_now().await;
                }
            }
        }
    }
}

impl Drop for Usher {
    fn drop(&mut self) {
        self.crowds.close();
        give(&mut self.crowd);
        while let Ok(mut crowd) = self.crowds.try_recv() {
            give(&mut crowd);
        }
    }
}

/// All permits in one step, and before anybody is answered: whoever has an answer finds its permit free.
fn give(answers: &mut Submissions) {
    let permits = answers.iter_mut().filter_map(|answer| answer.take_permit());
    drop(permits.reduce(|mut all, permit| {
        all.absorb(permit);
        all
    }));
    answers.drain(..).for_each(|answer| answer.send());
}
