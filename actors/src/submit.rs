//! The caller's side of a submission: check at the door, take permits, send, wait.

use std::sync::Arc;

use crate::batch::{BatchCacheOperations, Results};
use crate::error::Error;
use crate::geometry::BlockLayout;
use crate::permit::{Amount, Permit, Permits};
use crate::reply::Answer;
use crate::router::RouterHandle;
use crate::supervisor::Supervisor;

/// Submits batches. Shared by every handle of a cache.
#[derive(Debug)]
pub struct Submitter {
    /// The bytes of a block.
    pub layout: BlockLayout,
    /// Longest sequence.
    pub max_tokens: u32,
    /// Operations and bytes in flight.
    pub permits: Permits,
    /// Open sequences, as jobs.
    pub sequences: Permits,
    /// Where batches go.
    pub router: RouterHandle,
    /// Where the reason for a lost reply stands.
    pub supervisor: Arc<Supervisor>,
}

/// A batch that was not submitted, whole, and why.
pub type Refused = (Box<BatchCacheOperations>, Error);

impl Submitter {
    /// Waits for permits, submits, and waits for the results.
    ///
    /// Cancel safety: dropped before it was submitted, nothing happens; dropped later, the operations take effect and the
    /// results are dropped (sequences among them close). There is no state in between.
    ///
    /// # Errors
    /// [`Error::BatchTooLarge`], [`Error::TooManySequences`], [`Error::Closed`]; and [`Error::ShardLost`] if the shard
    /// died with the batch. What goes wrong with one operation is in its result.
    pub async fn submit(&self, mut batch: BatchCacheOperations) -> Result<Results, Error> {
        let (amount, sequences) = self.check(&mut batch)?;
        let permit = self.permits.acquire(amount).await?;
        self.send(batch, permit, sequences).map_err(|(_, error)| error)?.await
    }

    /// [`Submitter::submit`] of a batch of one operation that is built, and `bytes` of tensors copied, once a permit is had:
    /// however many callers wait, what they hold is theirs.
    ///
    /// # Errors
    /// As [`Submitter::submit`].
    pub async fn submit_one(
        &self,
        bytes: u64,
        build: impl FnOnce(&mut BatchCacheOperations),
    ) -> Result<Results, Error> {
        if bytes == 0 {
            let mut batch = BatchCacheOperations::new();
            build(&mut batch);
            return self.submit(batch).await;
        }
        let permit = self.permits.acquire(Amount { jobs: 1, bytes }).await?;
        let mut batch = BatchCacheOperations::new();
        build(&mut batch);
        batch.check(&self.layout, self.max_tokens);
        self.send(batch, permit, None).map_err(|(_, error)| error)?.await
    }

    /// Submits if permits are free now, and otherwise gives the batch back with the reason.
    ///
    /// # Errors
    /// [`Error::Overloaded`], and those of [`Submitter::submit`].
    pub fn try_submit(
        &self,
        mut batch: BatchCacheOperations,
    ) -> Result<impl Future<Output = Result<Results, Error>> + use<>, Refused> {
        let checked = self.check(&mut batch);
        match checked.and_then(|(amount, sequences)| Ok((self.permits.try_acquire(amount)?, sequences))) {
            Ok((permit, sequences)) => self.send(batch, permit, sequences),
            Err(error) => Err((Box::new(batch), error)),
        }
    }

    /// Refuses bad operations in place, and says what permits the batch needs.
    fn check(&self, batch: &mut BatchCacheOperations) -> Result<(Amount, Option<Permit>), Error> {
        batch.check(&self.layout, self.max_tokens);
        let amount = Amount { jobs: batch.len() as u64, bytes: batch.bytes(&self.layout) };
        let needed = batch.sequences_to_open();
        if needed == 0 {
            return Ok((amount, None));
        }
        let sequences =
            self.sequences.try_acquire(Amount { jobs: needed as u64, bytes: 0 }).map_err(|error| {
                let max_sequences = self.sequences.limit().jobs as usize;
                if error == Error::Closed { error } else { Error::TooManySequences { needed, max_sequences } }
            })?;
        Ok((amount, Some(sequences)))
    }

    fn send(
        &self,
        mut batch: BatchCacheOperations,
        permit: Permit,
        sequences: Option<Permit>,
    ) -> Result<impl Future<Output = Result<Results, Error>> + use<>, Refused> {
        if let Some(sequences) = sequences {
            batch.attach_sequence_permits(sequences);
        }
        batch.attach_read_buffers(&self.layout);
        let shard = batch.first_shard();
        let answer: Answer = self.router.submit(batch, permit)?;
        let supervisor = self.supervisor.clone();
        Ok(async move {
            answer.await.map_err(|_| {
                // The reply was dropped: its shard is lost, or the router has ended.
                shard
                    .and_then(|shard| supervisor.lost(shard))
                    .or_else(|| supervisor.any_lost())
                    .unwrap_or(Error::Closed)
            })
        })
    }
}
