//! What the oracle asks for: mostly sensible operations, some wrong in every way that there is.

use super::{Asked, Document, Oracle, Queued, Submitted};
use crate::batch::{BatchCacheOperations, HostTensor, Invalidate};
use crate::block::ExtraIdentity;
use crate::dropping::{KeyScore, TokenScores};
use crate::error::Error;
use crate::geometry::{ElementType, Plane};
use crate::pool::Tier;
use crate::sequence::{OpenOptions, RetentionHint, SINK_TOKENS, SequenceId, Tenant};
use crate::testing::model::Op;
use crate::testing::rig::{EachRow, Ticket, tenant_name, token_id, token_ids};
use crate::testing::values::not_finite;

/// Tenants of a run.
const TENANTS: u32 = 3;

impl Oracle {
    /// Submits a few operations.
    pub(super) fn submit(&mut self) {
        let mut batch = BatchCacheOperations::new();
        let for_tenant = self.rng.one_in(16).then(|| self.rng.below(TENANTS as usize) as u32);
        if let Some(tenant) = for_tenant {
            batch.only_tenant(Tenant::new(tenant_name(tenant)));
        }
        let count = match self.rng.below(4) {
            0 => self.rng.between(1, 8),
            _ => 1,
        };
        let mut asked = Vec::with_capacity(count as usize);
        let mut queued = Vec::new();
        for _ in 0..count as usize {
            match self.rng.one_in(8) {
                true => self.ask_each(&mut batch, for_tenant, &mut asked, &mut queued),
                false => {
                    let one = self.ask(&mut batch, asked.len(), for_tenant, &mut queued);
                    asked.push(one);
                }
            }
        }
        self.report.operations += asked.len() as u64;
        let ticket = self.rig.submit(batch);
        for (at, mut entry) in queued {
            entry.ticket = ticket;
            if let Some(tracked) = &mut self.tracked[at] {
                tracked.queue.push_back(entry);
            }
        }
        if self.rng.one_in(100) {
            self.cancel(ticket, &asked);
        } else {
            self.submitted.push(Submitted { ticket, asked });
        }
    }

    /// The caller goes away. What became of the operations is not known to anybody, so their sequences are given up.
    fn cancel(&mut self, ticket: Ticket, asked: &[Asked]) {
        self.rig.cancel(ticket);
        for asked in asked {
            if let Asked::On(at, _) = asked {
                self.doom(*at);
            }
        }
    }

    fn doom(&mut self, at: usize) {
        let Some(tracked) = self.tracked[at].as_mut().filter(|tracked| !tracked.doomed) else { return };
        tracked.doomed = true;
        tracked.closing = true;
        tracked.handle = None;
        let closed = tracked.model.as_ref().is_some_and(|model| model.is_closed());
        let close_is_sent = closed || tracked.queue.iter().any(|queued| queued.unanswered);
        // Nobody will ever know what these forks were made of.
        let unknown: Vec<_> = tracked.queue.drain(..).flat_map(|queued| queued.children).collect();
        if close_is_sent {
            self.retire(at);
        }
        for (child, id) in unknown {
            if self.tracked[child].as_ref().is_some_and(|tracked| tracked.id == id) {
                self.doom(child);
            }
        }
    }

    /// A handle is dropped.
    pub(super) fn drop_handle(&mut self) {
        if self.alive.len() > self.sequences_max / 2 {
            let at = self.alive[self.rng.below(self.alive.len())];
            self.tracked(at).handle = None;
            self.tracked(at).closing = true;
        }
    }

    /// One operation.
    fn ask(
        &mut self,
        batch: &mut BatchCacheOperations,
        index: usize,
        for_tenant: Option<u32>,
        queued: &mut Vec<(usize, Queued)>,
    ) -> Asked {
        let few = self.alive.len() < self.sequences_max / 2;
        if self.alive.is_empty()
            || self.alive.len() < self.sequences_max && self.rng.one_in(if few { 4 } else { 16 })
        {
            return self.ask_open(batch);
        }
        if self.rng.one_in(40) {
            return self.ask_nonsense(batch);
        }
        if self.rng.one_in(200) {
            let tenant = Tenant::new(tenant_name(self.rng.below(TENANTS as usize) as u32));
            let adapter = Invalidate::Adapter("adapter".into());
            batch.invalidate(0, self.rng.pick(&[Invalidate::All, Invalidate::Tenant(tenant), adapter]));
            return Asked::Invalidate;
        }
        let chosen = self.rng.below(self.alive.len());
        let at = self.alive[chosen];
        let (id, tenant) = match &self.tracked[at] {
            // Gone already or about to: now and then something is asked of it all the same.
            Some(tracked) if tracked.doomed || tracked.closing && !self.rng.one_in(8) => {
                return self.ask_open(batch);
            }
            Some(tracked) => (tracked.id, tracked.tenant),
            None => return self.ask_open(batch),
        };
        let op = self.choose(at);
        let foreign = for_tenant.is_some_and(|only| only != tenant);
        self.put(batch, id, tenant, &op);
        if !foreign {
            self.foresee(at, &op);
        }
        queued.push((at, Queued::new(index, op, foreign)));
        Asked::On(at, id)
    }

    /// A token each for a few sequences, the same one twice now and then.
    fn ask_each(
        &mut self,
        batch: &mut BatchCacheOperations,
        for_tenant: Option<u32>,
        asked: &mut Vec<Asked>,
        queued: &mut Vec<(usize, Queued)>,
    ) {
        let layer = self.rng.one_in(3).then(|| self.rng.below(self.rules.layout.layers) as u32);
        let mut rows = Vec::new();
        for _ in 0..self.rng.between(1, 6) {
            if self.alive.is_empty() {
                break;
            }
            let chosen = self.rng.below(self.alive.len());
            let at = self.alive[chosen];
            let Some((sequence, tenant, document)) = self.tracked[at]
                .as_ref()
                .filter(|t| !t.doomed && !t.closing)
                .map(|t| (t.id, t.tenant, t.document.map(|document| document.stamp(t.guess.committed))))
            else {
                continue;
            };
            if document.is_some() && layer.is_some() {
                continue;
            }
            let (stamp, finite) = (document.unwrap_or(self.next_stamp), !self.rng.one_in(16));
            self.next_stamp += 1;
            let op = match layer {
                Some(layer) => Op::Stage { layer, stamp, tokens: 1, finite },
                None => Op::Append { at: None, stamp, tokens: 1, finite, extra: None },
            };
            let foreign = for_tenant.is_some_and(|only| only != tenant);
            if !foreign {
                self.foresee(at, &op);
            }
            let spoil = (!finite).then(|| not_finite(tenant, stamp));
            rows.push(EachRow { sequence, tenant, stamp, spoil });
            queued.push((at, Queued::new(asked.len(), op, foreign)));
            asked.push(Asked::On(at, sequence));
        }
        match rows.is_empty() {
            true => asked.push(self.ask_open(batch)),
            false => self.rig.each(batch, layer, &rows),
        }
    }

    fn ask_open(&mut self, batch: &mut BatchCacheOperations) -> Asked {
        let tenant = self.rng.below(TENANTS as usize) as u32;
        let reserved_tokens = match self.rng.one_in(4) {
            true => self.rng.between(1, self.rules.max_tokens + 1),
            false => 0,
        };
        let mut options =
            OpenOptions::default().tenant(tenant_name(tenant).as_str()).reserve_tokens(reserved_tokens);
        if self.rng.one_in(4) {
            options = options.adapter("adapter");
        }
        let max_tokens = self.rules.max_tokens;
        let block_tokens = self.rules.layout.block_tokens as u32;
        let document = self.rng.one_in(2).then(|| {
            let number = self.rng.below(4) as u32;
            // Where a document's own tokens begin is its own.
            Document { number, own_from: number * (block_tokens + 1) }
        });
        let mut prompt_tokens = 0;
        if let Some(document) = document {
            prompt_tokens = self.rng.between(0, max_tokens);
            let ids: Vec<u32> = (0..prompt_tokens).map(|at| token_id(document.stamp(at))).collect();
            options = options.prompt(&ids);
            if self.rng.one_in(3) {
                let hint = RetentionHint::priority(self.rng.pick(&[0, 20, 50, 80, 100]));
                let hint =
                    if self.rng.one_in(2) { hint.for_ms(u64::from(self.rng.between(1, 400))) } else { hint };
                let hint = if self.rng.one_in(2) { hint.decaying() } else { hint };
                options = options.retain(0..self.rng.between(1, max_tokens + 1), hint);
            }
        }
        let config = self.rig.config();
        let root = (document.is_some() && config.dropping.is_none()).then(|| config.keys.root(&options));
        batch.open(options);
        if reserved_tokens > max_tokens {
            return Asked::Refused(Error::SequenceTooLong { tokens: reserved_tokens.into(), max_tokens });
        }
        Asked::Open { tenant, reserved_tokens, root, document, prompt_tokens }
    }

    /// What is refused at the door, or for want of a sequence.
    fn ask_nonsense(&mut self, batch: &mut BatchCacheOperations) -> Asked {
        let layout = self.rules.layout;
        let id = match self.closed_ids.is_empty() || self.rng.one_in(4) {
            true => SequenceId::new(0, 0, 1 << 19, self.rng.below(9) as u32),
            false => self.rng.pick(&self.closed_ids.clone()),
        };
        let none = HostTensor { element: ElementType::F32, bytes: &[] };
        Asked::Refused(match self.rng.below(9) {
            0 => {
                batch.append(id, None, &[], None, none, none);
                Error::Empty
            }
            1 => {
                batch.append(id, None, &[1, 2], None, none, none);
                Error::Shape {
                    plane: Plane::Key,
                    bytes: 0,
                    expected_bytes: layout.layers * 2 * layout.token_bytes(Plane::Key),
                    shape: [layout.layers, 2, layout.kv_heads, layout.key_dim],
                }
            }
            2 => {
                let half = HostTensor { element: ElementType::F16, bytes: &[] };
                batch.append(id, None, &[1], None, half, half);
                Error::ElementType { given: ElementType::F16, expected: ElementType::F32 }
            }
            3 => {
                batch.stage(id, layout.layers as u32, 1, none, none);
                Error::Layer { layer: layout.layers as u32, layers: layout.layers as u32 }
            }
            4 => {
                let visible = self.rules.max_tokens;
                batch.read(id, 0, 0..visible + 1);
                Error::TokenRange { range: 0..visible + 1, visible }
            }
            5 => {
                batch.fork(id, 0);
                Error::Empty
            }
            6 => {
                batch.drop_tokens(id, 5, vec![f32::INFINITY, f32::NAN].into());
                Error::ScoreNotANumber { token: 1 }
            }
            _ => {
                match self.rng.below(4) {
                    0 => batch.read(id, 0, 0..1),
                    1 => batch.fork(id, 1),
                    2 => batch.truncate(id, 0),
                    _ => batch.close(id),
                }
                match self.closed_ids.contains(&id) {
                    true => Error::ClosedSequence(id),
                    false => Error::UnknownSequence(id),
                }
            }
        })
    }

    /// An operation that would make sense where the sequence is thought to be, or nearly so.
    fn choose(&mut self, at: usize) -> Op {
        let (guess, document) = (self.tracked(at).guess.clone(), self.tracked(at).document);
        let model = self.tracked(at).model.as_ref();
        let gone = model.map_or(0, |model| model.committed() - model.stored());
        let stored = guess.committed.saturating_sub(gone);
        let layers = guess.layers.len();
        let staged = guess.layers.iter().any(|layer| *layer > guess.committed);
        let common = guess.layers.iter().copied().min().unwrap_or(0).saturating_sub(guess.committed);
        let (rng, block_tokens) = (&mut self.rng, self.rules.layout.block_tokens as u32);
        let tokens = match rng.below(16) {
            0 => rng.between(1, 2 * block_tokens + 1),
            1 => block_tokens,
            2..4 => block_tokens - guess.committed % block_tokens,
            4..6 => rng.between(1, block_tokens),
            _ => rng.between(1, 3),
        };
        let finite = !rng.one_in(32);
        let (tokens, stamp) = match document {
            Some(document) => (document.in_a_row(guess.committed, tokens), document.stamp(guess.committed)),
            None => (tokens, self.next_stamp),
        };
        let op = match rng.below(100) {
            // Token ids tell what is in a document: what is staged is named only when it is committed.
            0..3 | 38..48 if document.is_some() => {
                Op::Append { at: None, stamp, tokens, finite, extra: None }
            }
            // Staging goes on layer by layer until all have as much.
            0..60 if staged && common == 0 && !rng.one_in(8) => {
                let most = guess.layers.iter().copied().max().unwrap_or(0);
                let layer = guess.layers.iter().position(|layer| *layer < most).unwrap_or(0);
                let tokens = (most - guess.layers[layer]).max(1);
                Op::Stage { layer: layer as u32, stamp, tokens, finite }
            }
            0..20 if staged => Op::Commit { stamp, tokens: rng.between(0, common.max(1)) },
            0..3 => Op::Commit { stamp, tokens },
            3..38 => {
                let at = match rng.below(8) {
                    0 => Some(guess.committed + u32::from(rng.one_in(4))),
                    _ => None,
                };
                let extra = rng.one_in(8).then(|| ExtraIdentity([rng.below(3) as u8; 32]));
                Op::Append { at, stamp, tokens, finite, extra }
            }
            38..48 => Op::Stage { layer: rng.below(layers) as u32, stamp, tokens, finite },
            48..80 => {
                let layer = rng.below(layers);
                let visible = guess.layers[layer].max(guess.committed);
                let beyond = u32::from(rng.one_in(16));
                let end = rng.between(visible / 2, (visible + beyond).min(self.rules.max_tokens));
                let start = match rng.below(4) {
                    0 => rng.between(0, end),
                    1 => 0,
                    _ => end.saturating_sub(rng.between(0, 8)),
                };
                Op::Read { layer: layer as u32, tokens: start..end }
            }
            80..85 => Op::Fork { count: rng.pick(&[1, 1, 1, 2, 3]) },
            85..91 => {
                let end = guess.committed + u32::from(rng.one_in(8));
                let tokens = match rng.below(4) {
                    0 if rng.one_in(3) => rng.between(0, end),
                    0 => end / block_tokens * block_tokens,
                    1 if rng.one_in(4) => end.min(SINK_TOKENS - 1),
                    _ => end - rng.between(0, end.min(3)),
                };
                Op::Truncate { tokens }
            }
            91 => Op::Close,
            92..94 => Op::MoveTo { tier: Tier::Host },
            94..96 => Op::MoveTo { tier: Tier::Device },
            96..99 => {
                let scores = match rng.below(4) {
                    0 => TokenScores::Keys(KeyScore::Norm),
                    1 => TokenScores::Keys(KeyScore::Diff),
                    _ => {
                        let given = stored + u32::from(rng.one_in(8));
                        TokenScores::Given((0..given).map(|_| rng.below(64) as f32).collect())
                    }
                };
                Op::Drop { keep: rng.between(stored / 3, stored), scores }
            }
            _ => Op::Append { at: None, stamp, tokens, finite: true, extra: None },
        };
        let crowded = self.alive.len() >= self.sequences_max;
        match op {
            Op::Fork { .. } if crowded => Op::Close,
            Op::Close if self.alive.len() < self.sequences_max / 2 => {
                Op::Truncate { tokens: guess.committed / 2 }
            }
            Op::Append { tokens, .. } | Op::Stage { tokens, .. } => {
                self.next_stamp += u64::from(tokens);
                op
            }
            Op::Commit { .. } => {
                self.next_stamp += 1;
                op
            }
            op => op,
        }
    }

    /// Puts an operation into a batch.
    fn put(&mut self, batch: &mut BatchCacheOperations, id: SequenceId, tenant: u32, op: &Op) {
        match *op {
            Op::Append { at, stamp, tokens, finite, extra } => {
                let spoil = (!finite).then(|| not_finite(tenant, stamp));
                self.rig.append(batch, id, at, tenant, stamp, tokens, extra, spoil);
            }
            Op::Stage { layer, stamp, tokens, finite } => {
                let spoil = (!finite).then(|| not_finite(tenant, stamp));
                self.rig.stage(batch, id, layer, tenant, stamp, tokens, spoil);
            }
            Op::Commit { stamp, tokens } => batch.commit(id, &token_ids(stamp, tokens), None),
            Op::Read { layer, ref tokens } => batch.read(id, layer, tokens.clone()),
            Op::Fork { count } => batch.fork(id, count),
            Op::Truncate { tokens } => batch.truncate(id, tokens),
            Op::MoveTo { tier } => batch.move_to(id, tier),
            Op::Drop { keep, ref scores } => batch.drop_tokens(id, keep, scores.clone()),
            Op::Close => batch.close(id),
        }
    }

    /// Where the sequence will be if the operation succeeds.
    fn foresee(&mut self, at: usize, op: &Op) {
        let max_tokens = self.rules.max_tokens;
        let tracked = self.tracked(at);
        let guess = &mut tracked.guess;
        match op {
            Op::Append { tokens, finite: true, .. } if guess.committed + tokens <= max_tokens => {
                guess.committed += tokens;
                let committed = guess.committed;
                guess.layers.iter_mut().for_each(|layer| *layer = committed);
            }
            Op::Stage { layer, tokens, finite: true, .. } => {
                let layer = &mut guess.layers[*layer as usize];
                *layer = (*layer + tokens).min(max_tokens);
            }
            Op::Commit { tokens, .. } if guess.layers.iter().all(|l| *l >= guess.committed + tokens) => {
                guess.committed += tokens;
                let committed = guess.committed;
                guess.layers.iter_mut().for_each(|layer| *layer = committed);
            }
            Op::Truncate { tokens } if *tokens <= guess.committed => {
                guess.committed = *tokens;
                guess.layers.iter_mut().for_each(|layer| *layer = *tokens);
            }
            Op::Close => tracked.closing = true,
            _ => {}
        }
    }
}
