//! What a [`Worker`] does to a sequence: each operation, what must hold after it, and the check of what it returns.

use std::future::Future;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use half::f16;
use kv_cache::{BatchCacheOperations, Error, Outcome, Sequence, Tier};
use rand::Rng;

use crate::content;
use crate::model::{Model, Planned};
use crate::recorder::Kind;
use crate::worker::{BLOCKS_MAX, Fault, Held, Worker, expect};

/// Sequences of a decode step at most.
const STEP_MAX: usize = 8;

impl Worker {
    pub(crate) async fn append(&mut self, held: &mut Held) -> Result<(), Fault> {
        let tokens = self.some_tokens();
        self.make_room(held, tokens).await?;
        self.append_tokens(held, tokens).await
    }

    pub(crate) async fn append_tokens(&mut self, held: &mut Held, tokens: u32) -> Result<(), Fault> {
        let planned = self.plan(held, tokens);
        self.append_planned(held, &planned).await
    }

    pub(crate) async fn append_planned(&self, held: &mut Held, planned: &Planned) -> Result<(), Fault> {
        let (keys, values) = content::all_layers(&self.load.shape, &planned.seeds);
        let ids = planned.token_ids();
        let committed = self.timed(Kind::Append, held.sequence.append(&ids, &keys, &values)).await?;
        self.committed(held, planned, planned.tokens());
        expect("committed tokens after an append", held.model.len(), committed)
    }

    /// Layer by layer as a model computes; sometimes only some of the staged tokens are committed, as when a draft is
    /// rejected by speculative decoding.
    pub(crate) async fn append_staged(&mut self, held: &mut Held) -> Result<(), Fault> {
        let tokens = self.some_tokens();
        self.make_room(held, tokens).await?;
        let planned = self.plan(held, tokens);
        self.stage_all(held, &planned).await?;
        if self.rng.random_bool(0.2) {
            // A fork made now must not see the staged tokens.
            let fork = self.timed(Kind::Fork, held.sequence.fork()).await?;
            expect("committed tokens of a fork beside staged ones", held.model.len(), fork.len())?;
        }
        let accepted = if self.rng.random_bool(0.7) { tokens } else { self.rng.random_range(1..=tokens) };
        let ids = planned.token_ids();
        let committed = self.timed(Kind::Commit, held.sequence.commit(&ids[..accepted as usize])).await?;
        self.committed(held, &planned, accepted);
        expect("committed tokens after a commit", held.model.len(), committed)?;
        if accepted < tokens {
            let keep = held.model.len();
            self.cut(held, keep).await?;
        }
        Ok(())
    }

    pub(crate) async fn stage_all(&mut self, held: &mut Held, planned: &Planned) -> Result<(), Fault> {
        let end = held.model.len() + planned.tokens();
        for layer in 0..self.load.shape.layers {
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            content::push_layer(&self.load.shape, layer, &planned.seeds, &mut keys, &mut values);
            held.model.reached(end);
            let staged = self.timed(Kind::Stage, held.sequence.stage(layer, &keys, &values)).await?;
            expect("staged end of a layer", end, staged)?;
            if self.rng.random_bool(0.2) {
                // The owner sees a layer's staged tokens as soon as that layer is acknowledged.
                let read =
                    self.timed(Kind::Read, held.sequence.read::<f16>(layer, held.model.len()..end)).await?;
                self.check("staged tokens", &held.model, layer, held.model.len(), &planned.seeds, &read)?;
            }
        }
        Ok(())
    }

    pub(crate) async fn read(&mut self, held: &Held) -> Result<(), Fault> {
        let start = self.rng.random_range(0..held.model.len());
        let end = self.rng.random_range(start + 1..=held.model.len());
        let layer = self.rng.random_range(0..self.load.shape.layers);
        self.read_and_check("a random range", held, layer, start..end).await
    }

    /// Puts one or two forks in the place of other sequences of this worker, so that as many stay open.
    pub(crate) async fn fork(&mut self, slot: usize, held: &Held) -> Result<(), Fault> {
        let forks = if self.rng.random_bool(0.25) {
            self.timed(Kind::Fork, held.sequence.fork_many(2)).await?
        } else {
            vec![self.timed(Kind::Fork, held.sequence.fork()).await?]
        };
        for sequence in forks {
            expect("committed tokens of a fork", held.model.len(), sequence.len())?;
            let fork = self.opened(sequence, held.model.clone());
            let other = self.rng.random_range(0..self.slots.len());
            // The parent keeps its own place; a fork that drew it leaves at once.
            let leaves = if other == slot { Some(fork) } else { self.slots[other].replace(fork) };
            if let Some(held) = leaves {
                self.leave(held).await;
            }
        }
        Ok(())
    }

    pub(crate) async fn truncate(&mut self, held: &mut Held) -> Result<(), Fault> {
        let keep = self.rng.random_range(1..=held.model.len());
        self.cut(held, keep).await
    }

    /// Sealed blocks go to the host or come back, and are read where they are then.
    pub(crate) async fn change_tier(&mut self, held: &Held) -> Result<(), Fault> {
        let tier = if self.rng.random_bool(0.5) { Tier::Host } else { Tier::Device };
        let moved = match tier {
            Tier::Device => self.timed(Kind::Move, held.sequence.prefetch()).await?,
            _ => self.timed(Kind::Move, held.sequence.offload()).await?,
        };
        // The last one is sealed too if the sequence was cut inside of it.
        let blocks = held.model.len().div_ceil(self.load.shape.block_tokens);
        if moved > blocks {
            return Err(Fault::Wrong(format!("{moved} blocks moved to {tier:?}, of {blocks}")));
        }
        self.read(held).await
    }

    /// A decode step: a token each for some sequences, as one call.
    pub(crate) async fn append_each(&mut self) {
        let mut rows: Vec<(usize, Held, Planned)> = Vec::new();
        for _ in 0..self.rng.random_range(2..=STEP_MAX) {
            let slot = self.rng.random_range(0..self.slots.len());
            let Some(mut held) = self.slots[slot].take() else { continue };
            match self.make_room(&mut held, 1).await {
                Ok(()) => {
                    let planned = self.plan(&held, 1);
                    rows.push((slot, held, planned));
                }
                Err(fault) => self.recover(held, fault).await,
            }
        }
        let seeds: Vec<u64> = rows.iter().flat_map(|(_, _, planned)| planned.seeds.clone()).collect();
        let ids: Vec<u32> = rows.iter().flat_map(|(_, _, planned)| planned.token_ids()).collect();
        let (keys, values) = content::all_layers(&self.load.shape, &seeds);
        let batch = {
            let sequences: Vec<&Sequence> = rows.iter().map(|(_, held, _)| &held.sequence).collect();
            BatchCacheOperations::new().append_each(&sequences, &ids, &keys, &values)
        };
        let results = self.timed(Kind::Append, self.load.cache.submit(batch)).await;
        let (mut results, mut refused) = match results {
            Ok(results) => (results.into_iter(), None),
            Err(fault) => (Vec::new().into_iter(), Some(fault)),
        };
        for (slot, mut held, planned) in rows {
            let outcome = match results.next() {
                Some(Ok(Outcome::Appended { committed })) => {
                    self.committed(&mut held, &planned, 1);
                    expect("committed tokens after a step", held.model.len(), committed)
                }
                Some(Ok(other)) => Err(Fault::Wrong(format!("a step was answered with {other:?}"))),
                Some(Err(error)) => Err(Fault::of(Kind::Append, error)),
                None => Err(refused.take().unwrap_or_else(|| Fault::Wrong("a step was refused".into()))),
            };
            match outcome {
                Ok(()) => self.keep(slot, held),
                Err(fault) => self.recover(held, fault).await,
            }
        }
    }

    // ---- the small parts ----

    /// Mostly decoding, some chunks of prompt.
    pub(crate) fn some_tokens(&mut self) -> u32 {
        let block = self.load.shape.block_tokens;
        match self.rng.random_range(0..20) {
            0..10 => 1,
            10..17 => self.rng.random_range(2..=block / 2),
            _ => self.rng.random_range(block / 2..=block + block / 2),
        }
    }

    pub(crate) fn plan(&mut self, held: &Held, tokens: u32) -> Planned {
        let writer = self.fresh_writer();
        held.model.plan(tokens, writer)
    }

    pub(crate) fn fresh_writer(&mut self) -> u64 {
        self.writers += 1;
        self.index << 32 | self.writers
    }

    /// Truncates a sequence that has no room for `tokens` more.
    pub(crate) async fn make_room(&mut self, held: &mut Held, tokens: u32) -> Result<(), Fault> {
        let most = BLOCKS_MAX * self.load.shape.block_tokens - tokens;
        if held.model.len() <= most {
            return Ok(());
        }
        let keep = self.rng.random_range(1..=most);
        self.cut(held, keep).await
    }

    pub(crate) async fn cut(&mut self, held: &mut Held, keep: u32) -> Result<(), Fault> {
        self.truncated(held, keep);
        self.timed(Kind::Truncate, held.sequence.truncate(keep)).await?;
        expect("committed tokens after a truncation", keep, held.sequence.len())
    }

    pub(crate) fn truncated(&self, held: &mut Held, keep: u32) {
        held.model.truncated(keep);
        self.loses_sealed(held, keep);
    }

    /// Counted before the operation: the peak may be too low for a moment, never too high.
    pub(crate) fn loses_sealed(&self, held: &mut Held, keep: u32) {
        if held.has_sealed && keep < self.load.shape.block_tokens {
            held.has_sealed = false;
            self.load.recorder.sealed_lost();
        }
    }

    pub(crate) fn committed(&self, held: &mut Held, planned: &Planned, tokens: u32) {
        held.model.committed(planned, tokens);
        self.load.recorder.append_tokens.fetch_add(u64::from(tokens), Relaxed);
    }

    pub(crate) async fn read_and_check(
        &self,
        what: &'static str,
        held: &Held,
        layer: u32,
        range: Range<u32>,
    ) -> Result<(), Fault> {
        let seeds = held.model.seeds(range.clone());
        let first = range.start;
        let read = self.timed(Kind::Read, held.sequence.read::<f16>(layer, range)).await?;
        self.check(what, &held.model, layer, first, &seeds, &read)
    }

    pub(crate) fn check(
        &self,
        what: &'static str,
        model: &Model,
        layer: u32,
        first: u32,
        seeds: &[u64],
        (keys, values): &(Vec<f16>, Vec<f16>),
    ) -> Result<(), Fault> {
        self.load.recorder.read_tokens.fetch_add(seeds.len() as u64, Relaxed);
        content::check_layer(&self.load.shape, layer, first, seeds, (keys, values), &model.bound())
            .map_err(|mismatch| Fault::Mismatch(what, mismatch))
    }

    pub(crate) async fn check_all(&self, held: &Held) -> Result<(), Fault> {
        for layer in 0..self.load.shape.layers {
            self.read_and_check("the whole sequence at the end", held, layer, 0..held.model.len()).await?;
        }
        expect("committed tokens at the end", held.model.len(), held.sequence.len())
    }

    pub(crate) async fn timed<T>(
        &self,
        kind: Kind,
        operation: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Fault> {
        let begun = Instant::now();
        let result = operation.await;
        self.load.recorder.operation(kind, begun.elapsed());
        result.map_err(|error| Fault::of(kind, error))
    }
}
