//! Cancellation: futures dropped at random points, and the question what the sequence then holds.
//!
//! A future that is dropped may have done nothing, may still be queued, or may be done: all are right, anything between
//! is not. The next operation on the same sequence is answered after whatever was queued before it, so one read settles
//! which it was. What the runtime leaks here shows at the end, when blocks or permits stay in use.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use half::f16;
use kv_cache::Error;
use rand::Rng;

use crate::content;
use crate::model::Planned;
use crate::recorder::Kind;
use crate::worker::{self, Fault, Held, Worker};

impl Worker {
    /// Cancels one random operation, settles the outcome, and reads a whole layer.
    pub(crate) async fn cancel(&mut self, held: &mut Held) -> Result<(), Fault> {
        match self.rng.random_range(0..8) {
            0..2 => self.cancel_append(held).await?,
            2 => self.cancel_commit(held).await?,
            3 => self.cancel_stage(held).await?,
            4 => {
                let patience = self.patience();
                let whole = 0..held.model.len();
                self.cut_short(Kind::Read, patience, held.sequence.read::<f16>(0, whole)).await?;
            }
            5 => {
                let patience = self.patience();
                self.cut_short(Kind::Fork, patience, held.sequence.fork()).await?;
            }
            6 => self.cancel_truncate(held).await?,
            _ => {
                let (patience, tenant) = (self.patience(), self.tenant());
                let beginning = self.beginning(tenant);
                let open = self.load.cache.open(worker::tenant(tenant), beginning.options());
                self.cut_short(Kind::Open, patience, open).await?;
            }
        }
        let layer = self.rng.random_range(0..self.load.shape.layers);
        self.read_and_check("after a cancelled operation", held, layer, 0..held.model.len()).await
    }

    async fn cancel_append(&mut self, held: &mut Held) -> Result<(), Fault> {
        let planned = self.plan_some(held).await?;
        let (keys, values) = content::all_layers(&self.load.shape, &planned.seeds);
        let (ids, patience) = (planned.token_ids(), self.patience());
        let done = self
            .cut_short(Kind::Append, patience, held.sequence.append(&ids, &keys, &values))
            .await?
            .is_some();
        self.settle_write(held, &planned, done).await
    }

    async fn cancel_commit(&mut self, held: &mut Held) -> Result<(), Fault> {
        let planned = self.plan_some(held).await?;
        self.stage_all(held, &planned).await?;
        let (ids, patience) = (planned.token_ids(), self.patience());
        let done = self.cut_short(Kind::Commit, patience, held.sequence.commit(&ids)).await?.is_some();
        self.settle_write(held, &planned, done).await?;
        // If the commit never happened, all of it is still staged.
        let keep = held.model.len();
        self.cut(held, keep).await
    }

    async fn cancel_stage(&mut self, held: &mut Held) -> Result<(), Fault> {
        let planned = self.plan_some(held).await?;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        content::push_layer(&self.load.shape, 0, &planned.seeds, &mut keys, &mut values);
        held.model.reached(held.model.len() + planned.tokens());
        let patience = self.patience();
        self.cut_short(Kind::Stage, patience, held.sequence.stage(0, &keys, &values)).await?;
        let keep = held.model.len();
        self.cut(held, keep).await
    }

    async fn cancel_truncate(&mut self, held: &mut Held) -> Result<(), Fault> {
        let before = held.model.len();
        let (keep, patience) = (self.rng.random_range(1..=before), self.patience());
        self.loses_sealed(held, keep);
        let done = self.cut_short(Kind::Truncate, patience, held.sequence.truncate(keep)).await?.is_some();
        let now = self.settled_len(held, if done { [keep; 2] } else { [before, keep] }).await?;
        if now < before {
            self.truncated(held, now);
        }
        Ok(())
    }

    async fn plan_some(&mut self, held: &mut Held) -> Result<Planned, Fault> {
        let tokens = self.some_tokens();
        self.make_room(held, tokens).await?;
        Ok(self.plan(held, tokens))
    }

    async fn settle_write(&mut self, held: &mut Held, planned: &Planned, done: bool) -> Result<(), Fault> {
        let before = held.model.len();
        let after = before + planned.tokens();
        let now = self.settled_len(held, if done { [after; 2] } else { [before, after] }).await?;
        if now == after {
            self.committed(held, planned, planned.tokens());
        }
        Ok(())
    }

    /// The length once everything that was queued is done.
    async fn settled_len(&mut self, held: &Held, possible: [u32; 2]) -> Result<u32, Fault> {
        self.timed(Kind::Read, held.sequence.read::<f16>(0, 0..1)).await?;
        let now = held.sequence.len();
        if possible.contains(&now) {
            return Ok(now);
        }
        Err(Fault::Wrong(format!("{now} tokens after a cancelled operation; {possible:?} were possible")))
    }

    /// Turns of the scheduler that an operation is given: mostly it is dropped while queued, sometimes so late that it has
    /// long been carried out.
    fn patience(&mut self) -> u32 {
        if self.rng.random_bool(0.5) { self.rng.random_range(0..4) } else { self.rng.random_range(4..200) }
    }

    /// Polls `operation` until it is done or `patience` turns of the scheduler have passed, then drops it.
    async fn cut_short<T>(
        &self,
        kind: Kind,
        patience: u32,
        operation: impl Future<Output = Result<T, Error>>,
    ) -> Result<Option<T>, Fault> {
        let turns = async {
            for _ in 0..patience {
                tokio::task::yield_now().await;
            }
        };
        let begun = Instant::now();
        let (mut operation, mut turns) = (pin!(operation), pin!(turns));
        let result = tokio::select! {
            biased;
            result = &mut operation => result,
            () = &mut turns => {
                self.load.recorder.cancelled.fetch_add(1, Relaxed);
                return Ok(None);
            }
        };
        self.load.recorder.operation(kind, begun.elapsed());
        result.map(Some).map_err(|error| Fault::of(kind, error))
    }
}
