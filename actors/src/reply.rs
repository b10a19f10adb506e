//! Replies: the promise that a submission is answered exactly once.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::oneshot;

use smallvec::SmallVec;

use crate::batch::Results;
use crate::error::Error;
use crate::permit::Permit;
use crate::submission::{Answered, Brief, Submission};
use crate::sync::{Mutex, lock};

/// Answers one submission. Dropping it unanswered is noticed: the caller gets a typed error instead of waiting for ever.
#[derive(Debug)]
#[must_use = "a submission that is not answered leaves its caller with an error"]
pub struct Reply(Option<oneshot::Sender<Box<Submission>>>);

/// Where the caller waits.
///
/// The submission itself comes back with its results in it: what the caller's thread allocated is freed there, and the
/// actors free nothing.
#[derive(Debug)]
#[must_use = "whoever does not wait never learns what became of the submission"]
pub struct Answer(oneshot::Receiver<Box<Submission>>);

/// The reply was dropped, which happens only when an actor has died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unanswered;

impl Reply {
    /// A reply and the place to wait for it.
    pub fn new() -> (Reply, Answer) {
        let (sender, receiver) = oneshot::channel();
        (Reply(Some(sender)), Answer(receiver))
    }

    /// Answers. If the caller has gone, the results are dropped here: sequences among them close by themselves.
    pub(crate) fn send(mut self, submission: Box<Submission>) {
        if let Some(sender) = self.0.take() {
            drop(sender.send(submission));
        }
    }
}

impl Answer {
    /// The results if they are there, or [`Unanswered`] if they never will be.
    pub fn try_take(&mut self) -> Option<Result<Results, Unanswered>> {
        match self.0.try_recv() {
            Ok(submission) => Some(Ok(Answered(submission).into_results())),
            Err(oneshot::error::TryRecvError::Closed) => Some(Err(Unanswered)),
            Err(oneshot::error::TryRecvError::Empty) => None,
        }
    }

    /// As the future, with the results still as they came.
    pub(crate) fn poll_answered(&mut self, context: &mut Context<'_>) -> Poll<Result<Answered, Unanswered>> {
        Pin::new(&mut self.0).poll(context).map(|answered| answered.map(Answered).map_err(|_| Unanswered))
    }
}

impl Future for Answer {
    type Output = Result<Results, Unanswered>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_answered(context).map_ok(Answered::into_results)
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.0.is_some() {
            tracing::debug!(target: "kv_cache::reply", "a submission was dropped unanswered");
        }
    }
}

/// Where the results of (a part of) a submission go.
#[derive(Debug, Default)]
pub(crate) enum ReplyTo {
    /// The whole submission ran on one shard.
    Whole(Reply),
    /// Some operations of a submission that was split over shards.
    Part(Box<PartReply>),
    /// Nobody waits (closes by drop).
    #[default]
    Nobody,
}

/// Answers the operations of a split submission that one shard ran. If the shard dies first, they fail alone.
#[derive(Debug)]
pub(crate) struct PartReply {
    join: Arc<Join>,
    places: Vec<usize>,
    shard: u16,
}

impl PartReply {
    pub(crate) fn new(join: Arc<Join>, places: Vec<usize>, shard: u16) -> Self {
        PartReply { join, places, shard }
    }

    pub(crate) fn send(mut self, results: Results) {
        self.join.put(&std::mem::take(&mut self.places), results);
    }
}

impl Drop for PartReply {
    fn drop(&mut self) {
        if !self.places.is_empty() {
            let lost = Error::ShardLost { shard: self.shard, reason: "its actor stopped".into() };
            self.join.put(&self.places, self.places.iter().map(|_| Err(lost.clone())).collect());
        }
    }
}

/// Collects the parts of a split submission; the last part answers.
#[derive(Debug)]
pub(crate) struct Join(Mutex<JoinState>);

#[derive(Debug)]
struct JoinState {
    results: SmallVec<[Brief; 1]>,
    missing: usize,
    reply: Option<Reply>,
    /// Held until the last part has answered.
    permit: Option<Permit>,
}

impl Join {
    pub(crate) fn new(operations: usize, reply: Reply, permit: Option<Permit>) -> Arc<Join> {
        let results = std::iter::repeat_with(Brief::default).take(operations).collect();
        Arc::new(Join(Mutex::new(JoinState { results, missing: operations, reply: Some(reply), permit })))
    }

    /// Puts results in their places.
    pub(crate) fn put(&self, places: &[usize], results: Results) {
        let finished = {
            let mut state = lock(&self.0);
            for (&place, result) in places.iter().zip(results) {
                state.results[place] = result.into();
                state.missing -= 1;
            }
            if state.missing == 0 {
                drop(state.permit.take());
                state.reply.take().map(|reply| (reply, std::mem::take(&mut state.results)))
            } else {
                None
            }
        };
        if let Some((reply, results)) = finished {
            reply.send(Submission::answered(results));
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::batch::Outcome;
    use smallvec::smallvec;

    #[test]
    fn parts_arrive_in_any_order_and_results_keep_theirs() {
        let (reply, mut answer) = Reply::new();
        let join = Join::new(3, reply, None);
        join.put(&[2, 0], smallvec![Err(Error::Empty), Ok(Outcome::Closed)]);
        assert!(answer.try_take().is_none(), "one part is missing");
        join.put(&[1], smallvec![Err(Error::NotFinite)]);
        let results = answer.try_take().unwrap().unwrap();
        assert!(matches!(results[..], [Ok(Outcome::Closed), Err(Error::NotFinite), Err(Error::Empty)]));
    }

    #[test]
    fn a_reply_dropped_unanswered_is_noticed() {
        let (reply, mut answer) = Reply::new();
        drop(reply);
        assert_eq!(answer.try_take().unwrap().unwrap_err(), Unanswered);
    }
}
