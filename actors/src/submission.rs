//! A submission: what a caller asked for, and on its way back, what became of it.
//!
//! It is written once, in the caller's task, into one box. From there to the answer only the box moves, and what the caller
//! allocated is freed in the caller's task.

use std::time::Instant;

use smallvec::SmallVec;

use crate::batch::{BatchCacheOperations, Operation, Outcome, Results};
use crate::error::Error;
use crate::memory::ReadBuffer;
use crate::payload::Payload;
use crate::permit::Permit;
use crate::reply::{Join, PartReply, Reply, ReplyTo};
use crate::sequence::Tenant;

/// A submission, or the part of one that runs on one shard.
#[derive(Debug, Default)]
pub struct Submission {
    pub(crate) operations: SmallVec<[Operation; 1]>,
    pub(crate) token_ids: SmallVec<[u32; 4]>,
    pub(crate) tenant: Option<Tenant>,
    pub(crate) payload: Payload,
    results: SmallVec<[Brief; 1]>,
    unanswered: u32,
    permit: Option<Permit>,
    reply: ReplyTo,
    submitted_at: Option<Instant>,
}

/// Submissions on their way. Boxed, because they are written once and only their boxes move.
#[allow(clippy::vec_box)]
pub type Submissions = Vec<Box<Submission>>;

/// A result on its way. Small, because a batch has one per operation: what is large or rare is boxed.
#[derive(Debug, Default)]
pub(crate) enum Brief {
    #[default]
    Missing,
    Appended(u32),
    Staged(u32),
    Committed(u32),
    Truncated(u32),
    Moved(u32),
    Dropped(u32),
    Closed,
    Read(Box<ReadBuffer>),
    ReadDevice(u32),
    Other(Box<Outcome>),
    Failed(Box<Error>),
}

impl From<Result<Outcome, Error>> for Brief {
    fn from(result: Result<Outcome, Error>) -> Self {
        match result {
            Ok(Outcome::Appended { committed }) => Brief::Appended(committed),
            Ok(Outcome::Staged { staged }) => Brief::Staged(staged),
            Ok(Outcome::Committed { committed }) => Brief::Committed(committed),
            Ok(Outcome::Truncated { committed }) => Brief::Truncated(committed),
            Ok(Outcome::Moved { blocks }) => Brief::Moved(blocks),
            Ok(Outcome::Dropped { kept }) => Brief::Dropped(kept),
            Ok(Outcome::Closed) => Brief::Closed,
            Ok(Outcome::Read(buffer)) => Brief::Read(buffer),
            Ok(Outcome::ReadDevice { tokens }) => Brief::ReadDevice(tokens),
            Ok(other @ (Outcome::Opened(_) | Outcome::Forked(_) | Outcome::Invalidated { .. })) => {
                Brief::Other(Box::new(other))
            }
            Err(error) => Brief::Failed(Box::new(error)),
        }
    }
}

impl Brief {
    fn into_result(self) -> Option<Result<Outcome, Error>> {
        Some(Ok(match self {
            Brief::Missing => return None,
            Brief::Appended(committed) => Outcome::Appended { committed },
            Brief::Staged(staged) => Outcome::Staged { staged },
            Brief::Committed(committed) => Outcome::Committed { committed },
            Brief::Truncated(committed) => Outcome::Truncated { committed },
            Brief::Moved(blocks) => Outcome::Moved { blocks },
            Brief::Dropped(kept) => Outcome::Dropped { kept },
            Brief::Closed => Outcome::Closed,
            Brief::Read(buffer) => Outcome::Read(buffer),
            Brief::ReadDevice(tokens) => Outcome::ReadDevice { tokens },
            Brief::Other(other) => *other,
            Brief::Failed(error) => return Some(Err(*error)),
        }))
    }
}

impl Submission {
    /// A whole batch. `submitted_at` is only carried.
    pub fn new(
        batch: BatchCacheOperations,
        permit: Option<Permit>,
        reply: Option<Reply>,
        submitted_at: Option<Instant>,
    ) -> Box<Submission> {
        let mut submission = batch.into_submission();
        submission.permit = permit;
        submission.reply = reply.map_or(ReplyTo::Nobody, ReplyTo::Whole);
        submission.submitted_at = submitted_at;
        submission.expect_answers();
        submission
    }

    /// Results that its operations have.
    pub(crate) fn results(&self) -> usize {
        self.operations.iter().map(Operation::results).sum()
    }

    fn expect_answers(&mut self) {
        let mut count = 0;
        for operation in &mut self.operations {
            let results = operation.results();
            if let Operation::Each(each) = operation {
                each.first_result = count as u32;
            }
            count += results;
        }
        self.unanswered = count as u32;
        self.results.clear();
        self.results.resize_with(count, Brief::default);
    }

    /// Splits it by shard, given the shard of each result. The last part that is answered answers the whole.
    pub(crate) fn split(mut self, targets: &[usize], shards: usize) -> Vec<(usize, Box<Submission>)> {
        let ReplyTo::Whole(reply) = std::mem::take(&mut self.reply) else {
            return Vec::new();
        };
        let join = Join::new(targets.len(), reply, self.permit.take());
        let mut parts: Vec<SmallVec<[Operation; 1]>> = (0..shards).map(|_| SmallVec::new()).collect();
        let mut left = targets;
        for operation in self.operations.drain(..) {
            let (own, others) = left.split_at(operation.results());
            left = others;
            match operation {
                Operation::Each(each) => {
                    for (shard, part) in parts.iter_mut().enumerate() {
                        let rows = each.rows.iter().zip(own).filter(|(_, target)| **target == shard);
                        part.extend(each.with_rows(rows.map(|(row, _)| *row).collect()));
                    }
                }
                other => parts[own[0]].push(other),
            }
        }
        let parts = parts.into_iter().enumerate().filter(|(_, operations)| !operations.is_empty());
        parts
            .map(|(shard, operations)| {
                let places = (0..targets.len()).filter(|&at| targets[at] == shard).collect();
                let mut part = Box::new(Submission {
                    operations,
                    token_ids: self.token_ids.clone(),
                    tenant: self.tenant.clone(),
                    payload: self.payload.lend(),
                    reply: ReplyTo::Part(Box::new(PartReply::new(join.clone(), places, shard as u16))),
                    submitted_at: self.submitted_at,
                    ..Submission::default()
                });
                part.expect_answers();
                (shard, part)
            })
            .collect()
    }

    pub(crate) fn operations(&self) -> &[Operation] {
        &self.operations
    }

    /// Its permit, for whoever gives back many at once.
    pub(crate) fn take_permit(&mut self) -> Option<Permit> {
        self.permit.take()
    }

    /// When it was submitted.
    pub(crate) fn submitted_at(&self) -> Option<Instant> {
        self.submitted_at
    }

    /// Whether anybody was to learn what becomes of it.
    pub(crate) fn is_awaited(&self) -> bool {
        !matches!(self.reply, ReplyTo::Nobody)
    }

    /// Operations without an answer.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn unanswered(&self) -> usize {
        self.unanswered as usize
    }

    /// Whether a result is still due.
    pub(crate) fn is_missing(&self, result: usize) -> bool {
        matches!(self.results[result], Brief::Missing)
    }

    /// Answers one operation. True if it was the last.
    pub(crate) fn answer(&mut self, index: usize, result: Brief) -> bool {
        self.results[index] = result;
        self.unanswered -= 1;
        self.unanswered == 0
    }

    /// Answers every operation that has no answer yet with `error`, gives the permit back, then replies.
    pub(crate) fn refuse(mut self: Box<Self>, error: &Error) {
        for result in self.results.iter_mut().filter(|result| matches!(result, Brief::Missing)) {
            *result = Brief::Failed(Box::new(error.clone()));
        }
        self.send();
    }

    /// Gives the permit back, then replies: whoever has the answer finds the permit free.
    pub fn send(mut self: Box<Self>) {
        drop(self.permit.take());
        match std::mem::take(&mut self.reply) {
            ReplyTo::Whole(reply) => reply.send(self),
            ReplyTo::Part(part) => part.send(Answered(self).into_results()),
            ReplyTo::Nobody => {}
        }
    }

    /// Results without operations, to answer the caller of a split submission with.
    pub(crate) fn answered(results: SmallVec<[Brief; 1]>) -> Box<Submission> {
        Box::new(Submission { results, ..Submission::default() })
    }
}

/// A submission that has come back: its results, in the operations' order.
#[derive(Debug)]
pub struct Answered(pub(crate) Box<Submission>);

impl Answered {
    /// All results.
    pub fn into_results(self) -> Results {
        self.into_iter().collect()
    }

    /// The only result of a batch of one operation.
    pub fn into_only(mut self) -> Option<Result<Outcome, Error>> {
        self.0.results.pop().and_then(Brief::into_result)
    }

    /// Lets `change` see every error, and replaces it.
    pub(crate) fn map_errors(&mut self, change: impl Fn(&Error) -> Option<Error>) {
        for result in &mut self.0.results {
            if let Brief::Failed(error) = result
                && let Some(changed) = change(error)
            {
                **error = changed;
            }
        }
    }
}

impl IntoIterator for Answered {
    type Item = Result<Outcome, Error>;
    type IntoIter = AnsweredIter;

    fn into_iter(mut self) -> AnsweredIter {
        AnsweredIter(std::mem::take(&mut self.0.results).into_iter())
    }
}

/// See [`Answered`].
#[derive(Debug)]
pub struct AnsweredIter(smallvec::IntoIter<[Brief; 1]>);

impl Iterator for AnsweredIter {
    type Item = Result<Outcome, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next()?.into_result()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.0.size_hint()
    }
}

impl ExactSizeIterator for AnsweredIter {}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::memory::Flight;

    /// What a decode step writes and reads once per token: its cost is the memory that it touches.
    #[test]
    fn what_there_is_one_of_per_operation_is_small() {
        assert!(size_of::<Operation>() <= 72, "{}", size_of::<Operation>());
        assert!(size_of::<Brief>() <= 16, "{}", size_of::<Brief>());
        assert!(size_of::<Flight>() <= 32, "{}", size_of::<Flight>());
        assert!(size_of::<Submission>() <= 256, "{}", size_of::<Submission>());
    }
}
