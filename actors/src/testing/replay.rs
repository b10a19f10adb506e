//! Deterministic mode: the same operations in the same order give the same answers, places and bytes, however they were cut
//! into submissions and however fast the device was.
//!
//! A script is made by running it once, one operation at a time, and is then run again with the operations merged and split
//! at random, submitted while earlier ones are still under way, on lanes that move when they like.

use super::Rng;
use super::model::Op;
use super::rig::{Rig, Ticket, tenant_name, token_ids};
use super::scenario::Setup;
use super::sim::LANES;
use super::values::not_finite;
use crate::batch::{BatchCacheOperations, Outcome, Results};
use crate::block::{BlockId, Place};
use crate::device::Event;
use crate::dropping::{Dropping, KeyScore, TokenScores};
use crate::pool::Tier;
use crate::sequence::{OpenOptions, OpenSequence, SequenceId};

/// One operation of a script, with the ids that the first run gave.
enum Line {
    Open { tenant: u32, reserve_tokens: u32 },
    On { id: SequenceId, tenant: u32, op: Op },
}

/// What a run left behind.
#[derive(PartialEq)]
struct Outcomes {
    answers: Vec<String>,
    /// Per open sequence: committed tokens and the place of each block.
    places: Vec<(SequenceId, u32, Vec<Option<Place>>)>,
    bytes: Vec<u8>,
}

/// Makes a script of about `operations` operations and runs it `again` more times.
///
/// # Panics
/// If a run differs from the first one.
pub fn run(seed: u64, operations: usize, again: usize) {
    let mut rng = Rng::new(seed);
    let mut setup = Setup { deterministic: true, ..Setup::random(&mut rng) };
    if rng.one_in(4) {
        setup.dropping = Some(Dropping { score: Some(KeyScore::Norm), ratio: 0.5 });
    }
    let (script, first) = record(&setup, &mut rng, operations);
    for _ in 0..again {
        let other = replay(&setup, &mut rng, &script);
        if let Some(at) = (0..script.len()).find(|&at| first.answers[at] != other.answers[at]) {
            let (a, b) = (&first.answers[at], &other.answers[at]);
            panic!("KV_SEED={seed}: operation {at} was answered {a}, and now {b}; {setup:#?}");
        }
        if let Some((a, b)) = first.places.iter().zip(&other.places).find(|(a, b)| a != b) {
            panic!("KV_SEED={seed}: blocks lie elsewhere: {a:?}, and now {b:?}; {setup:#?}");
        }
        assert!(first.bytes == other.bytes, "KV_SEED={seed}: the slab holds other bytes; {setup:#?}");
    }
}

/// A sequence of the first run.
struct Known {
    handle: OpenSequence,
    tenant: u32,
    committed: u32,
}

fn record(setup: &Setup, rng: &mut Rng, operations: usize) -> (Vec<Line>, Outcomes) {
    let mut rig = Rig::new(setup);
    let (mut known, mut closed): (Vec<Known>, Vec<Known>) = (Vec::new(), Vec::new());
    let (mut script, mut answers) = (Vec::new(), Vec::new());
    for stamp in (0..operations as u64).map(|n| n << 8) {
        let line = if known.len() < 2 || known.len() < 10 && rng.one_in(12) {
            let reserve_tokens = if rng.one_in(4) { rng.between(0, setup.max_tokens) } else { 0 };
            Line::Open { tenant: rng.below(3) as u32, reserve_tokens }
        } else {
            let from = if !closed.is_empty() && rng.one_in(32) { &closed } else { &known };
            let Known { handle, tenant, committed } = &from[rng.below(from.len())];
            let op = choose(rng, setup, *committed, stamp, known.len() >= 10);
            Line::On { id: handle.id(), tenant: *tenant, op }
        };
        let mut batch = BatchCacheOperations::new();
        put(&mut rig, &mut batch, &line);
        let mut answer = rig.run(batch).remove(0);
        answers.push(format!("{answer:?}"));
        match (&line, &mut answer) {
            (Line::Open { tenant, .. }, _) => {
                if let Ok(Outcome::Opened(handle)) = answer {
                    known.push(Known { handle, tenant: *tenant, committed: 0 });
                }
            }
            (Line::On { tenant, .. }, Ok(Outcome::Forked(forks))) => {
                let committed = |handle: &OpenSequence| handle.shared().state().committed;
                known.extend(forks.drain(..).map(|handle| Known {
                    committed: committed(&handle),
                    handle,
                    tenant: *tenant,
                }));
            }
            (Line::On { id, .. }, Ok(Outcome::Closed)) => {
                if let Some(at) = known.iter().position(|known| known.handle.id() == *id) {
                    closed.push(known.swap_remove(at));
                }
            }
            (Line::On { id, .. }, _) => {
                if let Some(known) = known.iter_mut().find(|known| known.handle.id() == *id) {
                    known.committed = known.handle.shared().state().committed;
                }
            }
        }
        script.push(line);
    }
    let handles: Vec<_> = known.into_iter().chain(closed).map(|known| known.handle).collect();
    let outcomes = outcomes(&mut rig, answers, &handles);
    (script, outcomes)
}

fn choose(rng: &mut Rng, setup: &Setup, committed: u32, stamp: u64, crowded: bool) -> Op {
    let tokens = match rng.one_in(3) {
        true => rng.between(1, 2 * setup.geometry.block_tokens),
        false => rng.between(1, 3),
    };
    let layers = setup.geometry.groups[0].layers as usize;
    let finite = !rng.one_in(24);
    match rng.below(23) {
        0..9 => Op::Append { at: None, stamp, tokens, finite, extra: None },
        9..11 => Op::Stage { layer: rng.below(layers) as u32, stamp, tokens, finite },
        11 => Op::Commit { stamp, tokens: 1 },
        12..16 => {
            let start = rng.between(0, committed);
            Op::Read { layer: rng.below(layers) as u32, tokens: start..rng.between(start, committed) }
        }
        16 if !crowded => Op::Fork { count: rng.between(1, 2) },
        17..19 => Op::Truncate { tokens: rng.between(committed / 2, committed) },
        19 => Op::MoveTo { tier: rng.pick(&[Tier::Host, Tier::Device]) },
        20 => Op::Drop {
            keep: rng.between(committed / 3, committed),
            scores: TokenScores::Keys(KeyScore::Diff),
        },
        _ if crowded => Op::Close,
        _ => Op::Truncate { tokens: committed },
    }
}

fn put(rig: &mut Rig, batch: &mut BatchCacheOperations, line: &Line) {
    let (id, tenant, op) = match line {
        Line::Open { tenant, reserve_tokens } => {
            let options = OpenOptions::default().tenant(tenant_name(*tenant).as_str());
            return batch.open(options.reserve_tokens(*reserve_tokens));
        }
        Line::On { id, tenant, op } => (*id, *tenant, op),
    };
    match *op {
        Op::Append { at, stamp, tokens, finite, extra } => {
            let spoil = (!finite).then(|| not_finite(tenant, stamp));
            rig.append(batch, id, at, tenant, stamp, tokens, extra, spoil);
        }
        Op::Stage { layer, stamp, tokens, finite } => {
            let spoil = (!finite).then(|| not_finite(tenant, stamp));
            rig.stage(batch, id, layer, tenant, stamp, tokens, spoil);
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

fn replay(setup: &Setup, rng: &mut Rng, script: &[Line]) -> Outcomes {
    let mut rig = Rig::new(setup);
    let mut answers = vec![String::new(); script.len()];
    let mut handles = Vec::new();
    let mut submitted: Vec<(Ticket, usize)> = Vec::new();
    let largest = rng.pick(&[1, 3, 20]);
    let mut next = 0;
    while next < script.len() || !submitted.is_empty() {
        match rng.below(8) {
            0 if next < script.len() => {
                let mut batch = BatchCacheOperations::new();
                let end = (next + rng.between(1, largest) as usize).min(script.len());
                script[next..end].iter().for_each(|line| put(&mut rig, &mut batch, line));
                submitted.push((rig.submit(batch), next));
                next = end;
            }
            1 => rig.apply(Event::Seal),
            2 => rig.flush(),
            3..6 => {
                let lane = rng.pick(&LANES);
                while rng.below(4) > 0 && rig.device.advance(lane) {}
            }
            _ => {
                rig.report(rng.pick(&LANES));
            }
        }
        submitted.retain(|&(ticket, first)| match rig.take(ticket) {
            None => true,
            Some(results) => {
                keep(results.expect("the reply was not dropped"), &mut answers[first..], &mut handles);
                false
            }
        });
    }
    outcomes(&mut rig, answers, &handles)
}

fn keep(results: Results, answers: &mut [String], handles: &mut Vec<OpenSequence>) {
    for (result, answer) in results.into_iter().zip(answers) {
        *answer = format!("{result:?}");
        match result {
            Ok(Outcome::Opened(handle)) => handles.push(handle),
            Ok(Outcome::Forked(forks)) => handles.extend(forks),
            _ => {}
        }
    }
}

fn outcomes(rig: &mut Rig, answers: Vec<String>, handles: &[OpenSequence]) -> Outcomes {
    rig.settle();
    let blocks = rig.core().blocks();
    let mut places: Vec<_> = handles
        .iter()
        .map(|handle| {
            let state = handle.shared().state();
            let place = |block: &BlockId| blocks.place(*block).filter(|_| *block != BlockId::DROPPED);
            (handle.id(), state.committed, state.blocks.iter().map(place).collect())
        })
        .collect();
    places.sort_by_key(|(id, ..)| *id);
    let mut bytes = Vec::new();
    rig.device.copy_bytes(0..rig.config().pool.slab_bytes(), &mut bytes);
    Outcomes { answers, places, bytes }
}
