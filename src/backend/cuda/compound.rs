//! Steps that no kernel knows are carried out as steps that kernels know.
//!
//! - **Scores**: keys are read to the host, layer by layer, and scored there as the CPU device does.
//! - **Gathered tokens** are decoded into memory of the lane's own, one after the other, and appended from there.

use std::ops::Range;
use std::sync::Arc;

use kv_cache_actors::geometry::{BlockLayout, Plane};
use kv_cache_actors::memory::{AppendStep, GatherStep, Launch, ReadStep, ScoreStep, Step};

use super::driver::{DeviceMemory, DriverError, Gpu};
use crate::backend::cpu::codec::load_row;

/// Blocks that are gathered at once.
const STAGED_BLOCKS: usize = 8;

/// Memory for the tokens of some blocks, of a lane that gathers. Allocated when the lane is opened: a launch that finds no memory would
/// fail with all that others have in it.
#[derive(Debug, Default)]
pub(super) struct Staging(Option<DeviceMemory>);

impl Staging {
    /// For a lane that gathers.
    ///
    /// # Errors
    /// The driver's, with the bytes that are missing.
    pub(super) fn allocate(gpu: &Arc<Gpu>, layout: &BlockLayout) -> Result<Staging, DriverError> {
        gpu.make_current()?;
        DeviceMemory::uninitialised(gpu, STAGED_BLOCKS * layout.raw_bytes())
            .map(|memory| Staging(Some(memory)))
    }

    /// Whether a step appends what the steps before it have put here.
    pub(super) fn is_source_of(&self, step: &Step) -> bool {
        let Some(memory) = &self.0 else { return false };
        let all = memory.address()..memory.address() + memory.bytes() as u64;
        matches!(step, Step::Append(append) if append.on_device && all.contains(&(append.keys_at as u64)))
    }

    fn address(&self) -> Option<u64> {
        self.0.as_ref().map(DeviceMemory::address)
    }
}

/// Scores in the making: of one step, whose keys come layer by layer.
#[derive(Debug)]
pub(super) struct Scoring {
    step: ScoreStep,
    /// Keys of one layer, `[tokens, kv_heads, dim]`.
    keys: Vec<u8>,
    /// How many bytes of them are there.
    have: usize,
}

impl Scoring {
    fn new(layout: &BlockLayout, step: ScoreStep) -> Self {
        let tokens: usize = step.sources.iter().map(|source| source.tokens).sum();
        Scoring { step, keys: vec![0; tokens * layout.token_bytes(Plane::Key)], have: 0 }
    }

    /// The flight whose output the scores are.
    pub(super) fn flight(&self) -> usize {
        self.step.flight
    }

    /// Takes keys of the layer that it is at, and scores it once all are there.
    pub(super) fn take(&mut self, layout: &BlockLayout, token: usize, keys: &[u8], scores: &mut [f32]) {
        let at = token * layout.token_bytes(Plane::Key);
        self.keys[at..at + keys.len()].copy_from_slice(keys);
        self.have += keys.len();
        if self.have < self.keys.len() {
            return;
        }
        self.have = 0;
        let (row, dim) = (layout.row_bytes(Plane::Key), layout.key_dim);
        let mut of_head = vec![0.0; scores.len() * dim];
        for head in 0..layout.kv_heads {
            let rows = self.keys.chunks_exact(row).skip(head).step_by(layout.kv_heads);
            for (stored, key) in rows.zip(of_head.chunks_exact_mut(dim)) {
                load_row(layout.element, stored, key);
            }
            self.step.score.add(&of_head, dim, scores);
        }
    }
}

/// Replaces the steps of a launch that no kernel knows. The reads for scores come in the order that [`Scoring`] wants.
///
/// # Errors
/// In words, if tokens are to be gathered on a lane that was opened without memory for that.
pub(super) fn expand(
    layout: &BlockLayout,
    staging: &Staging,
    launch: &mut Launch,
) -> Result<Vec<Scoring>, &'static str> {
    let mut scorings = Vec::new();
    if !launch.steps.iter().any(|step| matches!(step, Step::Score(_) | Step::Gather(_))) {
        return Ok(scorings);
    }
    let mut steps = Vec::with_capacity(launch.steps.len());
    let mut appends: Vec<Step> = Vec::new();
    for step in launch.steps.drain(..) {
        match step {
            Step::Gather(gather) => {
                if appends.len() == STAGED_BLOCKS {
                    steps.append(&mut appends);
                }
                let memory = staging.address().ok_or("this lane has no memory to gather tokens in")?;
                let at = memory + (appends.len() * layout.raw_bytes()) as u64;
                appends.push(stage(layout, &gather, at, &mut steps));
            }
            other => {
                steps.append(&mut appends);
                match other {
                    Step::Score(score) => {
                        (0..layout.layers).for_each(|layer| steps.extend(reads(&score, layer)));
                        scorings.push(Scoring::new(layout, score));
                    }
                    other => steps.push(other),
                }
            }
        }
    }
    steps.append(&mut appends);
    launch.steps = steps;
    Ok(scorings)
}

/// Reads of the keys (and values, for which nobody asks) of one layer.
fn reads(score: &ScoreStep, layer: usize) -> impl Iterator<Item = Step> {
    let mut output_token = 0;
    score.sources.iter().map(move |source| {
        let read = ReadStep {
            flight: score.flight,
            format: source.format,
            positions: source.positions.clone(),
            slot_offset: source.slot_offset,
            layer,
            tokens: 0..source.tokens,
            output_token,
            on_device: None,
        };
        output_token += source.tokens;
        Step::Read(read)
    })
}

/// Decodes tokens to `at`: the append of them that has to follow.
fn stage(layout: &BlockLayout, gather: &GatherStep, at: u64, steps: &mut Vec<Step>) -> Step {
    let tokens = gather.tokens.len();
    let keys_bytes = layout.layers * tokens * layout.token_bytes(Plane::Key);
    let planes = [at, at + keys_bytes as u64];
    for layer in 0..layout.layers {
        let mut first = 0;
        for run in runs(&gather.tokens) {
            let output_token = layer * tokens + first;
            first += run.len();
            steps.push(Step::Read(ReadStep {
                flight: gather.flight,
                format: gather.format,
                positions: gather.positions.clone(),
                slot_offset: gather.from_offset,
                layer,
                tokens: run,
                output_token,
                on_device: Some(planes),
            }));
        }
    }
    Step::Append(AppendStep {
        flight: gather.flight,
        layers: 0..layout.layers,
        keys_at: planes[0] as usize,
        values_at: planes[1] as usize,
        on_device: true,
        payload_tokens: tokens,
        first_token: 0,
        slot_offset: gather.to_offset,
        tokens: gather.to_token..gather.to_token + tokens,
    })
}

/// Ascending tokens as runs.
fn runs(tokens: &[u32]) -> impl Iterator<Item = Range<usize>> {
    tokens.chunk_by(|a, b| a + 1 == *b).map(|run| run[0] as usize..run[0] as usize + run.len())
}

#[cfg(test)]
mod tests {
    use kv_cache_actors::dropping::{KeyScore, Positions};
    use kv_cache_actors::format::BlockFormat;
    use kv_cache_actors::memory::ScoreSource;

    use super::*;
    use crate::{ElementType, Geometry};

    #[test]
    fn tokens_that_follow_each_other_are_read_at_once() {
        let ranges = runs(&[0, 1, 2, 5, 7, 8]).collect::<Vec<_>>();
        assert_eq!(ranges, [0..3, 5..6, 7..9]);
        let layout = Geometry::new(2, 1, 8, ElementType::F16).block_tokens(16).layout().unwrap();
        let gather = GatherStep {
            flight: 3,
            format: BlockFormat::RAW,
            positions: Positions::Contiguous(16),
            from_offset: 128,
            tokens: vec![2, 3, 9],
            to_offset: 256,
            to_token: 5,
        };
        let mut steps = Vec::new();
        let Step::Append(append) = stage(&layout, &gather, 4096, &mut steps) else { panic!("no append") };
        assert_eq!((append.tokens, append.payload_tokens, append.layers), (5..8, 3, 0..2));
        assert_eq!((append.keys_at, append.values_at), (4096, 4096 + 2 * 3 * 16));
        let reads = steps.iter().map(|step| match step {
            Step::Read(read) => (read.layer, read.tokens.clone(), read.output_token),
            other => panic!("{other:?}"),
        });
        let expected = [(0, 2..4, 0), (0, 9..10, 2), (1, 2..4, 3), (1, 9..10, 5)];
        assert_eq!(reads.collect::<Vec<_>>(), expected);
    }

    /// The scores are those of the CPU device, whatever pieces the keys come in.
    #[test]
    fn scores_do_not_depend_on_how_keys_come() {
        let layout = Geometry::new(1, 2, 4, ElementType::F32).block_tokens(4).layout().unwrap();
        let source = |tokens| {
            let positions = Positions::Contiguous(0);
            ScoreSource { format: BlockFormat::RAW, positions, slot_offset: 0, tokens }
        };
        let sources = vec![source(4), source(2)];
        let step = ScoreStep { flight: 0, score: KeyScore::Norm, sources };
        let keys: Vec<f32> = (0..6 * 2 * 4).map(|at| (at * 37 % 19) as f32 - 7.0).collect();
        let mut expected = vec![0.0; 6];
        for head in 0..2 {
            let of_head = keys.chunks(4).skip(head).step_by(2).flatten().copied().collect::<Vec<_>>();
            KeyScore::Norm.add(&of_head, 4, &mut expected);
        }
        let bytes: &[u8] = bytemuck::cast_slice(&keys);
        let mut scoring = Scoring::new(&layout, step);
        let mut scores = vec![0.0; 6];
        for (token, count) in [(0, 1), (1, 3), (4, 2)] {
            scoring.take(&layout, token, &bytes[token * 32..(token + count) * 32], &mut scores);
        }
        assert_eq!(scores, expected);
    }
}
