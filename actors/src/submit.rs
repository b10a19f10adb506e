//! The caller's side of a submission: check at the door, take permits, send, wait.

use std::ops::Deref;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use crate::batch::{BatchCacheOperations, Outcome};
use crate::error::{Error, ErrorKind};
use crate::geometry::BlockLayout;
use crate::permit::{Amount, Permit, Permits};
use crate::prefix::Matcher;
use crate::reply::Answer;
use crate::router::RouterHandle;
use crate::submission::Answered;
use crate::supervisor::Supervisor;

/// Submits batches. Shared by every handle of a cache.
#[derive(Debug)]
pub struct Submitter {
    /// The bytes of a block.
    pub layout: BlockLayout,
    /// Longest sequence.
    pub max_tokens: u32,
    /// The device of each shard on which callers may have memory of their own.
    pub devices: Vec<Option<u16>>,
    /// Operations and bytes in flight.
    pub permits: Permits,
    /// Open sequences, as jobs.
    pub sequences: Permits,
    /// Where batches go.
    pub router: RouterHandle,
    /// Where the reason for a lost reply stands.
    pub supervisor: Arc<Supervisor>,
    /// What never came as far as a shard.
    pub refusals: Refusals,
    /// Finds prompts.
    pub matcher: Matcher,
}

/// Counts submissions that were refused as a whole, by kind of error.
#[derive(Debug, Default)]
pub struct Refusals([AtomicU64; ErrorKind::ALL.len()]);

impl Refusals {
    fn count(&self, error: &Error) {
        self.0[error.kind() as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// So far, by [`ErrorKind`].
    pub fn counts(&self) -> [u64; ErrorKind::ALL.len()] {
        std::array::from_fn(|kind| self.0[kind].load(Ordering::Relaxed))
    }
}

/// The permits that a batch needs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Needs {
    /// Operations, and the bytes that they carry in and out.
    pub amount: Amount,
    /// Sequences that they open.
    pub sequences: usize,
}

/// A batch that was not submitted, whole, and why.
pub type Refused = (BatchCacheOperations, Error);

impl Submitter {
    /// Waits for permits, submits, and waits for the results.
    ///
    /// Cancel safety: dropped before it was submitted, nothing happens; dropped later, the operations take effect and the
    /// results are dropped (sequences among them close). There is no state in between.
    ///
    /// # Errors
    /// [`Error::BatchTooLarge`], [`Error::TooManySequences`], [`Error::Closed`]; and [`Error::ShardLost`] if the shard
    /// died with the batch. What goes wrong with one operation is in its result.
    pub async fn submit(&self, batch: BatchCacheOperations) -> Result<Answered, Error> {
        self.submit_only(batch).await?.await
    }

    /// [`Submitter::submit`] that returns when the batch is submitted; what it returns waits for the results.
    ///
    /// # Errors
    /// As [`Submitter::submit`].
    pub async fn submit_only(
        &self,
        mut batch: BatchCacheOperations,
    ) -> Result<Waiting<Arc<Supervisor>>, Error> {
        let needs = self.needs(&mut batch);
        let permits = async {
            let sequences = self.sequences_for(needs.sequences)?;
            Ok((sequences, self.permits.acquire(needs.amount).await?))
        };
        let (sequences, permit) = permits.await.inspect_err(|error| self.refusals.count(error))?;
        Ok(self.send(batch, permit, sequences, self.supervisor.clone()))
    }

    /// [`Submitter::submit`] of a batch of one operation that is built once its permits are had, and its result: however
    /// many callers wait, what they hold is theirs, and small.
    ///
    /// # Errors
    /// As [`Submitter::submit`], and those of the operation.
    // An `async fn` would keep its arguments twice, in every task that waits.
    #[allow(clippy::manual_async_fn)]
    pub fn submit_one(
        &self,
        needs: Needs,
        build: impl FnOnce(&mut BatchCacheOperations),
    ) -> impl Future<Output = Result<Outcome, Error>> {
        async move {
            let refused = |error: &Error| self.refusals.count(error);
            let sequences = self.sequences_for(needs.sequences).inspect_err(refused)?;
            let permit = match self.permits.try_acquire(needs.amount) {
                // Boxed: only those who wait need the room for it.
                Err(Error::Overloaded { .. }) => Box::pin(self.permits.acquire(needs.amount)).await,
                answered => answered,
            };
            let permit = permit.inspect_err(refused)?;
            // Everything large lives inside this call and not across an await.
            let waiting = self.build_and_send(permit, sequences, build);
            waiting.await?.into_only().unwrap_or(Err(Error::Empty))
        }
    }

    fn build_and_send(
        &self,
        permit: Permit,
        sequences: Option<Permit>,
        build: impl FnOnce(&mut BatchCacheOperations),
    ) -> Waiting<&Supervisor> {
        let mut batch = BatchCacheOperations::new();
        build(&mut batch);
        self.send(batch, permit, sequences, &*self.supervisor)
    }

    /// Submits if permits are free now, and otherwise gives the batch back with the reason.
    ///
    /// # Errors
    /// [`Error::Overloaded`], and those of [`Submitter::submit`].
    pub fn try_submit(&self, mut batch: BatchCacheOperations) -> Result<Waiting<Arc<Supervisor>>, Refused> {
        let needs = self.needs(&mut batch);
        let permits = self
            .sequences_for(needs.sequences)
            .and_then(|sequences| Ok((sequences, self.permits.try_acquire(needs.amount)?)));
        match permits {
            Ok((sequences, permit)) => Ok(self.send(batch, permit, sequences, self.supervisor.clone())),
            Err(error) => {
                self.refusals.count(&error);
                Err((batch, error))
            }
        }
    }

    fn needs(&self, batch: &mut BatchCacheOperations) -> Needs {
        let max_sequences = self.sequences.limit().jobs as usize;
        batch.refuse_impossible(&self.layout, self.max_tokens, self.permits.limit(), max_sequences);
        let amount = Amount { jobs: batch.len() as u64, bytes: batch.bytes(&self.layout, self.max_tokens) };
        Needs { amount, sequences: batch.sequences_to_open() }
    }

    /// Permits for sequences to open. Never waits for them: they come back when sequences close, whenever that is.
    fn sequences_for(&self, needed: usize) -> Result<Option<Permit>, Error> {
        if needed == 0 {
            return Ok(None);
        }
        let permit = self.sequences.try_acquire(Amount { jobs: needed as u64, bytes: 0 });
        permit.map(Some).map_err(|error| {
            let max_sequences = self.sequences.limit().jobs as usize;
            if error == Error::Closed { error } else { Error::TooManySequences { needed, max_sequences } }
        })
    }

    fn send<S>(
        &self,
        mut batch: BatchCacheOperations,
        permit: Permit,
        sequences: Option<Permit>,
        supervisor: S,
    ) -> Waiting<S> {
        if let Some(sequences) = sequences {
            batch.attach_sequence_permits(sequences);
        }
        batch.check(&self.layout, self.max_tokens, &self.devices);
        batch.match_prompts(&self.matcher);
        batch.attach_read_buffers(&self.layout);
        let shard = batch.first_shard();
        let answer = self.router.submit(batch, permit);
        Waiting { answer, shard, supervisor }
    }
}

/// The results of a batch that was submitted, to be awaited. Dropping it drops the results, not the work.
#[derive(Debug)]
#[must_use = "the operations take effect either way, but only this says how"]
pub struct Waiting<S> {
    answer: Answer,
    shard: Option<u16>,
    /// Where the reason for a lost reply stands. Counting references to it would be a write to memory that all callers
    /// share: who can borrow it does.
    supervisor: S,
}

impl<S: Deref<Target = Supervisor> + Unpin> Future for Waiting<S> {
    type Output = Result<Answered, Error>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Waiting { answer, shard, supervisor } = self.get_mut();
        answer.poll_answered(context).map(|answer| match answer {
            Ok(mut answered) => {
                // Parts of a batch that died with their shard know no more than that: here stands why.
                answered.map_errors(|error| match error {
                    Error::ShardLost { shard, .. } => Some(supervisor.lost(*shard).unwrap_or(Error::Closed)),
                    _ => None,
                });
                Ok(answered)
            }
            Err(_) => {
                // The reply was dropped: its shard is lost, or the router has ended.
                let lost = shard.and_then(|shard| supervisor.lost(shard));
                Err(lost.or_else(|| supervisor.any_lost()).unwrap_or(Error::Closed))
            }
        })
    }
}
