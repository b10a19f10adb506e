//! The naive model of a cache: every sequence by itself, a list of tokens, nothing shared, nothing evicted, nothing in flight.
//!
//! It is asked, operation by operation in each sequence's order, whether an answer was right, and then does the same. An
//! answer is right if it is exactly what the model computes; or if it is one of the refusals that depend on what the model
//! does not know (room, tokens of others, injected faults), and then nothing may have changed.

use std::ops::Range;

use super::rig::token_id;
use super::values::{fill_row, first_difference};
use crate::batch::Outcome;
use crate::block::{BlockKey, ExtraIdentity, KeyScheme};
use crate::dropping::{Dropping, KeyScore, TokenScores, choose};
use crate::error::Error;
use crate::format::BlockFormat;
use crate::geometry::{BlockLayout, Plane};
use crate::memory::{Elements, ReadBuffer};
use crate::pool::Tier;
use crate::sequence::{SINK_TOKENS, SequenceId};

/// What all sequences of a model have in common.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Slots of the host tier.
    pub host_slots: usize,
    /// The shape of what is stored.
    pub layout: BlockLayout,
    /// Format of sealed blocks.
    pub format: BlockFormat,
    /// Longest sequence.
    pub max_tokens: u32,
    /// Tokens of all sequences.
    pub max_total_tokens: u64,
    /// How tokens are dropped without being asked to: by truncation, or not at all.
    pub dropping: Option<Dropping>,
    /// Whether launches may fail.
    pub faults: bool,
    /// How block keys are made.
    pub keys: KeyScheme,
}

/// An operation on one sequence.
#[derive(Debug, Clone)]
pub enum Op {
    /// Tokens to all layers.
    Append {
        /// Position that the caller names.
        at: Option<u32>,
        /// Stamp of the first token.
        stamp: u64,
        /// How many.
        tokens: u32,
        /// Whether every element is finite.
        finite: bool,
        /// Extra identity.
        extra: Option<ExtraIdentity>,
    },
    /// Tokens to one layer.
    Stage {
        /// Which.
        layer: u32,
        /// Stamp of the first token.
        stamp: u64,
        /// How many.
        tokens: u32,
        /// Whether every element is finite.
        finite: bool,
    },
    /// Count staged tokens in.
    Commit {
        /// Stamp that the token ids follow from.
        stamp: u64,
        /// How many.
        tokens: u32,
    },
    /// Read.
    Read {
        /// Which layer.
        layer: u32,
        /// Which tokens.
        tokens: Range<u32>,
    },
    /// Fork.
    Fork {
        /// How many times.
        count: u32,
    },
    /// Truncate.
    Truncate {
        /// To how many tokens.
        tokens: u32,
    },
    /// Move to a tier.
    MoveTo {
        /// Which.
        tier: Tier,
    },
    /// Drop tokens by their scores.
    Drop {
        /// How many stay.
        keep: u32,
        /// Their scores.
        scores: TokenScores,
    },
    /// Close.
    Close,
}

/// What may be known of a block's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Identity {
    /// The key must be there.
    Public,
    /// It was cut and filled again: whether it had been sealed in between is a matter of time.
    Either,
    /// No key may be there.
    Private,
}

/// One sequence of the model.
#[derive(Debug, Clone)]
pub struct ModelSequence {
    id: SequenceId,
    tenant: u32,
    /// Stamps of the tokens that each layer holds.
    layers: Vec<Vec<u64>>,
    committed: u32,
    window_start: u32,
    /// Of the committed tokens, those that were dropped by their scores.
    gone: Vec<bool>,
    /// Some were, since it was last empty.
    compacted: bool,
    ids: Vec<(u32, Option<ExtraIdentity>)>,
    blocks: Vec<Identity>,
    /// Up to this many tokens, an append cannot fail for lack of room.
    promised_tokens: u32,
    closed: bool,
}

impl ModelSequence {
    /// An empty sequence.
    pub fn new(rules: &Rules, id: SequenceId, tenant: u32, reserved_tokens: u32) -> Self {
        ModelSequence {
            id,
            tenant,
            layers: vec![Vec::new(); rules.layout.layers],
            committed: 0,
            window_start: 0,
            gone: Vec::new(),
            compacted: false,
            ids: Vec::new(),
            blocks: Vec::new(),
            promised_tokens: reserved_tokens,
            closed: false,
        }
    }

    /// It has found a prefix of tokens with these stamps in the cache.
    pub fn found(&mut self, rules: &Rules, stamps: &[u64]) {
        self.layers.iter_mut().for_each(|layer| layer.extend_from_slice(stamps));
        self.ids.extend(stamps.iter().map(|stamp| (token_id(*stamp), None)));
        self.committed = stamps.len() as u32;
        self.gone.resize(stamps.len(), false);
        self.blocks.resize(rules.layout.blocks_for(stamps.len()), Identity::Public);
    }

    /// A fork of it.
    pub fn fork(&self, rules: &Rules, id: SequenceId) -> Self {
        let mut fork = self.clone();
        let cut = !(self.stored() as usize).is_multiple_of(rules.layout.block_tokens);
        if let (Some(last), true, true) = (fork.blocks.last_mut(), cut, self.has_staged())
            && !rules.format.is_raw()
            && *last == Identity::Public
        {
            // Its owner may fill the shared block in place and have it sealed before the fork writes.
            *last = Identity::Either;
        }
        fork.id = id;
        fork.promised_tokens = 0;
        fork.layers.iter_mut().for_each(|layer| layer.truncate(self.committed as usize));
        fork
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Committed tokens.
    pub fn committed(&self) -> u32 {
        self.committed
    }

    /// Positions of the committed tokens that were not dropped by their scores.
    pub fn positions(&self) -> impl Iterator<Item = u32> {
        (0..self.committed).filter(|at| !self.gone[*at as usize])
    }

    /// How many they are.
    pub fn stored(&self) -> u32 {
        self.positions().count() as u32
    }

    /// What of a layer can be read.
    pub fn readable(&self, layer: usize) -> Vec<Range<u32>> {
        let dropped = self.dropped();
        let is_there = |at: &u32| !self.is_gone(*at) && !dropped.contains(at);
        let mut runs: Vec<Range<u32>> = Vec::new();
        for at in (0..self.visible(layer)).filter(is_there) {
            match runs.last_mut() {
                Some(run) if run.end == at => run.end += 1,
                _ => runs.push(at..at + 1),
            }
        }
        runs
    }

    fn is_gone(&self, at: u32) -> bool {
        self.gone.get(at as usize).copied().unwrap_or(false)
    }

    /// Up to which token a layer can be read.
    pub fn visible(&self, layer: usize) -> u32 {
        self.layers[layer].len() as u32
    }

    /// First token of the window, if tokens were dropped.
    pub fn window_start(&self) -> u32 {
        self.window_start
    }

    /// Whose it is.
    pub fn tenant(&self) -> u32 {
        self.tenant
    }

    fn has_staged(&self) -> bool {
        self.layers.iter().any(|layer| layer.len() > self.committed as usize)
    }

    fn dropped(&self) -> Range<u32> {
        if self.window_start > SINK_TOKENS { SINK_TOKENS..self.window_start } else { 0..0 }
    }

    /// What the model would answer; nothing if it would do it.
    fn refusal(&self, rules: &Rules, op: &Op) -> Option<Error> {
        if self.closed {
            return Some(Error::ClosedSequence(self.id));
        }
        let too_long = |start: u32, tokens: u32| {
            (start + tokens > rules.max_tokens).then_some(Error::SequenceTooLong {
                tokens: u64::from(start + tokens),
                max_tokens: rules.max_tokens,
            })
        };
        match op {
            Op::Append { at, tokens, .. } => {
                if at.is_some_and(|at| at != self.committed) {
                    return Some(Error::Position { expected: at.unwrap_or(0), actual: self.committed });
                }
                if self.has_staged() {
                    let most = self.layers.iter().map(|layer| layer.len() as u32).max().unwrap_or(0);
                    return Some(Error::StagedTokens { staged: most - self.committed });
                }
                too_long(self.committed, *tokens)
            }
            Op::Stage { layer, tokens, .. } => too_long(self.visible(*layer as usize), *tokens),
            Op::Commit { tokens, .. } => {
                let staged = |layer: &Vec<u64>| layer.len() as u32 - self.committed;
                let layer = self.layers.iter().position(|layer| staged(layer) < *tokens)?;
                let staged = staged(&self.layers[layer]);
                Some(Error::NotStaged { tokens: *tokens, layer: layer as u32, staged })
            }
            Op::Read { layer, tokens } => {
                let visible = self.visible(*layer as usize);
                if tokens.start > tokens.end || tokens.end > visible {
                    return Some(Error::TokenRange { range: tokens.clone(), visible });
                }
                let dropped = self.dropped();
                let hits = !tokens.clone().all(|token| !dropped.contains(&token))
                    || tokens.is_empty() && dropped.start < tokens.start && tokens.start < dropped.end;
                if hits {
                    return Some(Error::TokensDropped { range: tokens.clone(), dropped });
                }
                let first = tokens.clone().find(|at| self.is_gone(*at))?;
                let start = (0..first).rev().take_while(|at| self.is_gone(*at)).last().unwrap_or(first);
                let end = (first..).find(|at| !self.is_gone(*at))?;
                Some(Error::TokensDropped { range: tokens.clone(), dropped: start..end })
            }
            Op::Drop { scores, .. } => {
                if rules.dropping.is_some() {
                    return Some(Error::Unsupported {
                        what: "dropping tokens by scores",
                        instead: "the cache truncates already; choose another `compression.method`, or none",
                    });
                }
                if self.has_staged() {
                    let most = self.layers.iter().map(|layer| layer.len() as u32).max().unwrap_or(0);
                    return Some(Error::StagedTokens { staged: most - self.committed });
                }
                let tokens = self.stored();
                match scores {
                    TokenScores::Given(scores) if scores.len() != tokens as usize => {
                        Some(Error::Scores { scores: scores.len(), tokens })
                    }
                    _ => None,
                }
            }
            Op::Truncate { tokens } => {
                if *tokens > self.committed {
                    return Some(Error::TokenRange { range: 0..*tokens, visible: self.committed });
                }
                let dropped = self.dropped();
                let hits = dropped.start < *tokens && *tokens < dropped.end;
                hits.then_some(Error::TokensDropped { range: 0..*tokens, dropped })
            }
            Op::Fork { .. } | Op::MoveTo { .. } | Op::Close => None,
        }
    }

    /// Whether the operation may be refused for a reason that the model cannot know.
    fn may_be_refused(&self, rules: &Rules, op: &Op, error: &Error) -> bool {
        let writes = matches!(op, Op::Append { .. } | Op::Stage { .. });
        match error {
            Error::Capacity { needed, free, .. } => {
                let end = match op {
                    Op::Append { tokens, .. } => self.committed + tokens,
                    Op::Stage { layer, tokens, .. } => self.visible(*layer as usize) + tokens,
                    _ => 0,
                };
                needed > free && (writes && end > self.promised_tokens || matches!(op, Op::Drop { .. }))
            }
            Error::TenantQuota { needed_bytes, used_bytes, quota_bytes } => {
                let end = match op {
                    Op::Append { tokens, .. } => self.committed + tokens,
                    Op::Stage { layer, tokens, .. } => self.visible(*layer as usize) + tokens,
                    _ => 0,
                };
                let drops = matches!(op, Op::Drop { .. });
                used_bytes + needed_bytes > *quota_bytes && (writes && end > self.promised_tokens || drops)
            }
            Error::TooManyTokens { tokens, max_total_tokens } => {
                let counts = writes || matches!(op, Op::Commit { .. } | Op::Fork { .. });
                counts && *max_total_tokens == rules.max_total_tokens && tokens > max_total_tokens
            }
            Error::Unsupported { .. } => {
                matches!(op, Op::MoveTo { tier: Tier::Host }) && rules.host_slots == 0
            }
            Error::TierFull { tier, needed, free } => {
                matches!(op, Op::MoveTo { tier: to } if to == tier && needed > free)
            }
            Error::Device(_) => {
                let launches = matches!(op, Op::Read { .. } | Op::MoveTo { .. } | Op::Drop { .. });
                rules.faults && (writes || launches)
            }
            _ => false,
        }
    }

    /// Checks an answer, and does what it says was done.
    ///
    /// # Errors
    /// Why the answer is wrong.
    pub fn check(&mut self, rules: &Rules, op: &Op, answer: &Result<Outcome, Error>) -> Result<(), String> {
        if let Some(refusal) = self.refusal(rules, op) {
            return match answer {
                Err(error) if *error == refusal => Ok(()),
                _ => Err(format!("{}: {op:?} must be refused with {refusal:?}", self.id)),
            };
        }
        let spoiled = matches!(op, Op::Append { finite: false, .. } | Op::Stage { finite: false, .. });
        match answer {
            Err(Error::NotFinite) if spoiled => return Ok(()),
            Err(error) if self.may_be_refused(rules, op, error) => return Ok(()),
            Ok(_) if spoiled => return Err(format!("{}: {op:?} holds NaN or infinity", self.id)),
            _ => {}
        }
        self.carry_out(rules, op);
        let committed = self.committed;
        let right = match (op, answer) {
            (Op::Append { .. }, Ok(Outcome::Appended { committed: told })) => *told == committed,
            (Op::Commit { .. }, Ok(Outcome::Committed { committed: told })) => *told == committed,
            (Op::Truncate { .. }, Ok(Outcome::Truncated { committed: told })) => *told == committed,
            (Op::Stage { layer, .. }, Ok(Outcome::Staged { staged })) => {
                *staged == self.visible(*layer as usize)
            }
            // How many was checked by whoever took the handles out.
            (Op::Fork { .. }, Ok(Outcome::Forked(_))) => true,
            (Op::MoveTo { .. }, Ok(Outcome::Moved { .. })) => true,
            (Op::Drop { .. }, Ok(Outcome::Dropped { kept })) => *kept == self.stored(),
            (Op::Close, Ok(Outcome::Closed)) => true,
            (Op::Read { layer, tokens }, Ok(Outcome::Read(buffer))) => {
                return self.check_read(&rules.layout, *layer as usize, tokens.clone(), buffer);
            }
            _ => false,
        };
        if right { Ok(()) } else { Err(format!("{}: a wrong answer to {op:?} in state {self:?}", self.id)) }
    }

    /// Checks what was read.
    ///
    /// # Errors
    /// Where it differs from what was written.
    pub fn check_read(
        &self,
        layout: &BlockLayout,
        layer: usize,
        tokens: impl Iterator<Item = u32> + Clone,
        buffer: &ReadBuffer,
    ) -> Result<(), String> {
        let stamps: Vec<u64> = tokens.clone().map(|at| self.layers[layer][at as usize]).collect();
        for (plane, elements) in [(Plane::Key, &buffer.keys), (Plane::Value, &buffer.values)] {
            let Elements::Single(elements) = elements else { return Err("elements are not f32".into()) };
            if let Some((token, head)) =
                first_difference(elements, layout, plane, layer, self.tenant, &stamps)
            {
                let token = tokens.clone().nth(token);
                let row = &elements[..elements.len().min(32)];
                return Err(format!(
                    "{}: layer {layer} token {token:?} head {head} {plane:?} was read wrong: {row:?}",
                    self.id
                ));
            }
        }
        Ok(())
    }

    fn carry_out(&mut self, rules: &Rules, op: &Op) {
        match op {
            Op::Append { stamp, tokens, extra, .. } => {
                let stamps = *stamp..*stamp + u64::from(*tokens);
                self.layers.iter_mut().for_each(|layer| layer.extend(stamps.clone()));
                self.count_in(rules, *stamp, *tokens, *extra);
            }
            Op::Stage { layer, stamp, tokens, .. } => {
                self.layers[*layer as usize].extend(*stamp..*stamp + u64::from(*tokens));
            }
            Op::Commit { stamp, tokens } => {
                let end = (self.committed + tokens) as usize;
                if self.layers.iter().any(|layer| layer.len() > end) {
                    self.promised_tokens = 0;
                }
                self.layers.iter_mut().for_each(|layer| layer.truncate(end));
                self.count_in(rules, *stamp, *tokens, None);
            }
            Op::Truncate { tokens } => {
                if self.dropped().is_empty() || *tokens <= SINK_TOKENS {
                    self.window_start = 0;
                }
                let tokens = *tokens as usize;
                let block_tokens = rules.layout.block_tokens;
                let before = self.stored() as usize;
                self.gone.truncate(tokens);
                self.compacted &= tokens > 0;
                self.layers.iter_mut().for_each(|layer| layer.truncate(tokens));
                self.ids.truncate(tokens);
                self.committed = tokens as u32;
                self.promised_tokens = 0;
                let stored = self.stored() as usize;
                let was_full = (stored / block_tokens + 1) * block_tokens <= before;
                self.blocks.truncate(stored.div_ceil(block_tokens));
                let cut = !stored.is_multiple_of(block_tokens);
                if let (Some(last), true, true) = (self.blocks.last_mut(), cut, was_full)
                    && !rules.format.is_raw()
                    && *last == Identity::Public
                {
                    *last = Identity::Either;
                }
            }
            Op::Fork { .. } => self.promised_tokens = 0,
            Op::Drop { keep, scores } => self.drop_tokens(rules, *keep, scores),
            Op::Close => self.closed = true,
            Op::Read { .. } | Op::MoveTo { .. } => {}
        }
    }

    fn count_in(&mut self, rules: &Rules, stamp: u64, tokens: u32, extra: Option<ExtraIdentity>) {
        let first_block = self.stored() as usize / rules.layout.block_tokens;
        self.ids.extend((stamp..stamp + u64::from(tokens)).map(|stamp| (token_id(stamp), extra)));
        self.committed += tokens;
        self.gone.resize(self.committed as usize, false);
        self.blocks.resize(rules.layout.blocks_for(self.stored() as usize), Identity::Public);
        if self.window_start > SINK_TOKENS || self.compacted {
            // Computed from fewer tokens than there are ids.
            self.blocks[first_block..].fill(Identity::Private);
        }
        if let Some(Dropping { ratio, .. }) = rules.dropping {
            let kept = (f64::from(self.committed) * f64::from(ratio)).ceil() as u32;
            let recent = kept.saturating_sub(SINK_TOKENS).max(1);
            let start = self.committed.saturating_sub(recent);
            if start > SINK_TOKENS {
                self.window_start = self.window_start.max(start);
            }
        }
    }

    fn drop_tokens(&mut self, rules: &Rules, keep: u32, scores: &TokenScores) {
        let positions: Vec<u32> = self.positions().collect();
        if keep.max(SINK_TOKENS + 1) as usize >= positions.len() {
            return;
        }
        let scores = match scores {
            TokenScores::Given(scores) => scores.clone(),
            TokenScores::Keys(score) => {
                let (layout, mut scores) = (rules.layout, vec![0.0; positions.len()]);
                for layer in 0..layout.layers {
                    for head in 0..layout.kv_heads {
                        let mut keys = vec![0.0; positions.len() * layout.key_dim];
                        for (key, at) in keys.chunks_exact_mut(layout.key_dim).zip(&positions) {
                            let stamp = self.layers[layer][*at as usize];
                            fill_row(stamp, self.tenant, layer, Plane::Key, head, key);
                        }
                        score.add(&keys, layout.key_dim, &mut scores);
                    }
                }
                KeyScore::shared(&scores)
            }
        };
        self.gone.fill(true);
        for stored in choose(&scores, keep) {
            self.gone[positions[stored as usize] as usize] = false;
        }
        self.compacted = true;
        self.promised_tokens = 0;
        self.blocks = vec![Identity::Private; rules.layout.blocks_for(self.stored() as usize)];
    }

    /// Checks the key of full block `at`, where `found` is what the cache says.
    ///
    /// # Errors
    /// If the key names other content, is missing, or must not be there.
    pub fn check_key(
        &self,
        rules: &Rules,
        root: Option<BlockKey>,
        at: usize,
        found: Option<BlockKey>,
    ) -> Result<(), String> {
        let block_tokens = rules.layout.block_tokens;
        let dropped = self.dropped();
        let gone = (at * block_tokens) as u32 >= dropped.start.max(1).next_multiple_of(block_tokens as u32)
            && ((at + 1) * block_tokens) as u32 <= dropped.end;
        let worst = |a: Identity, b: &Identity| match (a, *b) {
            (Identity::Private, _) | (_, Identity::Private) => Identity::Private,
            (Identity::Either, _) | (_, Identity::Either) => Identity::Either,
            _ => Identity::Public,
        };
        let identity = self.blocks[..=at].iter().fold(Identity::Public, worst);
        let Some(mut key) = root else {
            return match found {
                None => Ok(()),
                Some(_) => Err(format!("{}: it shares nothing, and block {at} has a key", self.id)),
            };
        };
        let Some(found) = found else {
            let may_miss = gone || identity != Identity::Public;
            return if may_miss { Ok(()) } else { Err(format!("{}: block {at} lost its key", self.id)) };
        };
        if gone || identity == Identity::Private {
            return Err(format!("{}: block {at} must not have a key", self.id));
        }
        for tokens in self.ids.chunks_exact(block_tokens).take(at + 1) {
            let ids: Vec<u32> = tokens.iter().map(|(id, _)| *id).collect();
            let extra = tokens.iter().zip(0..).filter_map(|((_, extra), at)| Some((at, (*extra)?)));
            key = rules.keys.child(key, &ids, extra);
        }
        if key == found {
            Ok(())
        } else {
            Err(format!("{}: block {at} has the key of other content", self.id))
        }
    }
}
