//! Lanes of the CPU device: each carries a launch out when it is launched, on the thread of the actor that owns it.

use std::sync::Arc;

use kv_cache_actors::dropping::Positions;
use kv_cache_actors::format::{BlockFormat, Format, FormatLayout, Ladder};
use kv_cache_actors::geometry::{BlockLayout, Plane};
use kv_cache_actors::memory::{
    AppendStep, Backend, DeviceLost, GatherStep, Lane, Lanes, Launch, ReadBuffer, ReadStep, ScoreStep, Step,
};
use kv_cache_actors::pool::PoolLayout;

use super::codec::{Kernels, load_row};
use super::slab::Slab;
use crate::key_means::{Centres, Keys, Scratch};

/// A CPU device to be opened over a slab.
pub(crate) struct CpuBackend {
    slab: Arc<Slab>,
    kernels: Kernels,
    centres: Option<Arc<Centres>>,
}

impl CpuBackend {
    /// Sealed keys are differences from `centres`, if there are any.
    pub(crate) fn new(slab: Arc<Slab>, kernels: Kernels, centres: Option<Arc<Centres>>) -> Self {
        CpuBackend { slab, kernels, centres }
    }
}

impl Backend for CpuBackend {
    type Lane = CpuLane;

    fn open(self, block: &BlockLayout, _: &PoolLayout, _: &Ladder) -> Result<Lanes<CpuLane>, String> {
        let lane = || CpuLane {
            slab: self.slab.clone(),
            kernels: self.kernels,
            centres: self.centres.clone(),
            layout: *block,
            scratch: Scratch::default(),
            done: Vec::new(),
        };
        Ok(Lanes { compute: lane(), upload: lane(), download: lane() })
    }
}

/// A lane that is always done.
pub(crate) struct CpuLane {
    slab: Arc<Slab>,
    kernels: Kernels,
    centres: Option<Arc<Centres>>,
    layout: BlockLayout,
    /// For keys of a head less their centres.
    scratch: Scratch,
    done: Vec<Launch>,
}

impl Lane for CpuLane {
    fn launch(&mut self, mut launch: Launch) {
        let mut steps = std::mem::take(&mut launch.steps);
        for step in &mut steps {
            match step {
                Step::Zero { slot_offset } => self.zero(*slot_offset),
                Step::Copy { from_offset, to_offset } => {
                    self.copy(*from_offset, *to_offset, self.layout.raw_bytes())
                }
                Step::Transfer { from_offset, to_offset, bytes } => {
                    self.copy(*from_offset, *to_offset, *bytes)
                }
                Step::Reopen { format, positions, from_offset, to_offset } => {
                    self.reopen(*format, positions, *from_offset, *to_offset)
                }
                Step::Append(append) if !append.on_device => {
                    let finite = self.append(append, launch.payload(append.flight));
                    launch.flights[append.flight].finite &= finite;
                }
                Step::AppendRows(rows) if !rows.on_device => {
                    let payload = launch.payload(rows.flight);
                    for at in 0..rows.rows.len() {
                        let step = rows.step_of(&rows.rows[at]);
                        rows.rows[at].finite &= self.append(&step, payload);
                    }
                }
                Step::Seal { flight, format, positions, from_offset, to_offset } => {
                    launch.flights[*flight].finite &= self.seal(*format, positions, *from_offset, *to_offset);
                }
                Step::Read(read) if read.on_device.is_none() => {
                    if let Some(output) = &mut launch.flights[read.flight].output {
                        self.read(read, output);
                    }
                }
                Step::Score(score) => {
                    if let Some(output) = &mut launch.flights[score.flight].output {
                        self.score(score, output.scores_mut());
                    }
                }
                Step::Gather(gather) => self.gather(gather),
                // Steps of a newer core: failing loudly beats leaving bytes out.
                other => launch.error = Some(format!("the CPU device does not know {other:?}").into()),
            }
        }
        launch.steps = steps;
        self.done.push(launch);
    }

    fn poll(&mut self, done: &mut Vec<Launch>) -> Result<(), DeviceLost> {
        done.append(&mut self.done);
        Ok(())
    }
}

impl CpuLane {
    fn zero(&self, slot: usize) {
        // SAFETY: a new slot of the launch's own (2).
        unsafe { self.slab.bytes_mut(slot..slot + self.layout.raw_bytes()) }.fill(0);
    }

    fn copy(&self, from: usize, to: usize, bytes: usize) {
        // SAFETY: the source is pinned (3), the target a new slot of the launch's own (2): two slots, so they do not overlap.
        let (source, target) =
            unsafe { (self.slab.bytes(from..from + bytes), self.slab.bytes_mut(to..to + bytes)) };
        target.copy_from_slice(source);
    }

    /// Scatters `[layers, tokens, kv_heads, dim]` to `[layer][K|V][kv_head][token][dim]`; true if all is finite.
    fn append(&self, step: &AppendStep, payload: &[u8]) -> bool {
        let layout = &self.layout;
        let mut finite = true;
        for (at, layer) in step.layers.clone().enumerate() {
            for (plane, tensor_at) in [(Plane::Key, step.keys_at), (Plane::Value, step.values_at)] {
                let (row, token) = (layout.row_bytes(plane), layout.token_bytes(plane));
                let source = tensor_at + (at * step.payload_tokens + step.first_token) * token;
                let source = &payload[source..source + step.tokens.len() * token];
                let plane_at = step.slot_offset + layout.plane_offset(layer, plane);
                for head in 0..layout.kv_heads {
                    let target = plane_at + (head * layout.block_tokens + step.tokens.start) * row;
                    // SAFETY: rows of a slot of the launch's own (2) that no reader has been shown (4).
                    let target = unsafe { self.slab.bytes_mut(target..target + step.tokens.len() * row) };
                    let source = &source[head * row..];
                    finite &= self.kernels.copy_rows(
                        layout.element,
                        source,
                        token,
                        target,
                        row,
                        row,
                        step.tokens.len(),
                    );
                }
            }
        }
        finite
    }

    /// Encodes a whole block; true if all is finite.
    fn seal(&mut self, format: BlockFormat, positions: &Positions, from: usize, to: usize) -> bool {
        let layout = &self.layout;
        let sealed = FormatLayout::new(format, layout);
        let all = 0..layout.rows_per_plane();
        let mut finite = true;
        for layer in 0..layout.layers {
            for plane in Plane::BOTH {
                let raw = from + layout.plane_offset(layer, plane);
                let (codes, scales) = sealed.places(layout, layer, plane, &all);
                // SAFETY: the source is a full block held by the flight, which nobody writes to; the target is a new slot of
                // the flight's own (2), and codes and scales lie apart in it.
                let (raw, codes, scales) = unsafe {
                    (
                        self.slab.bytes(raw..raw + layout.plane_bytes(plane)),
                        self.slab.bytes_mut(to + codes.start..to + codes.end),
                        self.slab.bytes_mut(to + scales.start..to + scales.end),
                    )
                };
                let of = sealed.rows(layout, layer, plane);
                if of.format == Format::Raw {
                    let row = of.row_bytes();
                    finite &= self.kernels.copy_rows(of.element, raw, row, codes, row, row, all.len());
                    continue;
                }
                let (Some(centres), Plane::Key) = (&self.centres, plane) else {
                    finite &= self.kernels.encode(of, raw, codes, scales);
                    continue;
                };
                // A head after the other: what is left of it is encoded while it is in the nearest cache.
                let tokens = 0..layout.block_tokens;
                let head_bytes = layout.block_tokens * layout.row_bytes(plane);
                let codes = codes.chunks_exact_mut(tokens.len() * of.row_bytes());
                let scales = scales.chunks_exact_mut(of.scales_bytes(tokens.len()));
                for (head, ((raw, codes), scales)) in
                    raw.chunks_exact(head_bytes).zip(codes).zip(scales).enumerate()
                {
                    let keys = Keys { layer, head, positions, tokens: tokens.clone() };
                    finite &=
                        centres.encode(self.kernels, &keys, of, raw, [codes, scales], &mut self.scratch);
                }
            }
        }
        finite
    }

    /// Decodes a whole block into a raw slot.
    fn reopen(&mut self, format: BlockFormat, positions: &Positions, from: usize, to: usize) {
        let (layout, slab) = (self.layout, Arc::clone(&self.slab));
        for layer in 0..layout.layers {
            for plane in Plane::BOTH {
                let target = to + layout.plane_offset(layer, plane);
                // SAFETY: a new slot of the launch's own (2).
                let target = unsafe { slab.bytes_mut(target..target + layout.plane_bytes(plane)) };
                for head in 0..layout.kv_heads {
                    let bytes = layout.block_tokens * layout.row_bytes(plane);
                    let target = &mut target[head * bytes..(head + 1) * bytes];
                    let keys = Keys { layer, head, positions, tokens: 0..layout.block_tokens };
                    self.decode(format, from, plane, &keys, target, layout.row_bytes(plane));
                }
            }
        }
    }

    /// Gathers `[layer][K|V][kv_head][token][dim]` to `[tokens, kv_heads, dim]`.
    fn read(&mut self, step: &ReadStep, output: &mut ReadBuffer) {
        let layout = self.layout;
        for plane in Plane::BOTH {
            let (row, token) = (layout.row_bytes(plane), layout.token_bytes(plane));
            let output = &mut output.plane_mut(plane)[step.output_token * token..];
            for head in 0..layout.kv_heads {
                let ReadStep { format, slot_offset, layer, ref positions, ref tokens, .. } = *step;
                let keys = Keys { layer, head, positions, tokens: tokens.clone() };
                self.decode(format, slot_offset, plane, &keys, &mut output[head * row..], token);
            }
        }
    }

    /// Adds up what the keys of each layer and head say of the tokens.
    fn score(&mut self, step: &ScoreStep, scores: &mut [f32]) {
        let (layout, row) = (self.layout, self.layout.row_bytes(Plane::Key));
        let mut stored = vec![0; scores.len() * row];
        let mut keys = vec![0.0; scores.len() * layout.key_dim];
        for layer in 0..layout.layers {
            for head in 0..layout.kv_heads {
                let mut rest = &mut stored[..];
                for source in &step.sources {
                    let (these, behind) = rest.split_at_mut(source.tokens * row);
                    let positions = &source.positions;
                    let which = Keys { layer, head, positions, tokens: 0..source.tokens };
                    self.decode(source.format, source.slot_offset, Plane::Key, &which, these, row);
                    rest = behind;
                }
                load_row(layout.element, &stored, &mut keys);
                step.score.add(&keys, layout.key_dim, scores);
            }
        }
    }

    /// Decodes some tokens of a block to tokens of a raw slot that follow each other.
    fn gather(&mut self, step: &GatherStep) {
        let layout = self.layout;
        let (first, last) = (step.tokens.first(), step.tokens.last());
        let (Some(&first), Some(&last)) = (first, last) else { return };
        let mut decoded = Vec::new();
        for layer in 0..layout.layers {
            for plane in Plane::BOTH {
                let row = layout.row_bytes(plane);
                decoded.resize((last + 1 - first) as usize * row, 0);
                for head in 0..layout.kv_heads {
                    let tokens = first as usize..last as usize + 1;
                    let which = Keys { layer, head, positions: &step.positions, tokens };
                    self.decode(step.format, step.from_offset, plane, &which, &mut decoded, row);
                    let target = layout.plane_offset(layer, plane)
                        + (head * layout.block_tokens + step.to_token) * row;
                    let target = step.to_offset + target;
                    // SAFETY: rows of a slot of the launch's own (2).
                    let target = unsafe { self.slab.bytes_mut(target..target + step.tokens.len() * row) };
                    for (to, token) in target.chunks_exact_mut(row).zip(&step.tokens) {
                        let from = (token - first) as usize * row;
                        to.copy_from_slice(&decoded[from..from + row]);
                    }
                }
            }
        }
    }

    /// Decodes rows of one head, keys or values, of a slot: row `i` to `target[i * stride]`.
    fn decode(
        &mut self,
        format: BlockFormat,
        slot: usize,
        plane: Plane,
        which: &Keys,
        target: &mut [u8],
        stride: usize,
    ) {
        let (layout, layer) = (&self.layout, which.layer);
        let first = which.head * layout.block_tokens + which.tokens.start;
        let rows = first..first + which.tokens.len();
        let (element, row) = (layout.element, layout.row_bytes(plane));
        let stored = FormatLayout::new(format, layout);
        let (codes, scales) = stored.places(layout, layer, plane, &rows);
        // SAFETY: acknowledged rows (4) of a slot that the flight has pinned (3); nobody writes to sealed blocks.
        let (codes, scales) = unsafe {
            (
                self.slab.bytes(slot + codes.start..slot + codes.end),
                self.slab.bytes(slot + scales.start..slot + scales.end),
            )
        };
        let of = stored.rows(layout, layer, plane);
        match of.format {
            Format::Raw => {
                self.kernels.copy_rows(element, codes, row, target, stride, row, rows.len());
            }
            _ => {
                let skip = rows.start % of.scale_rows();
                match (&self.centres, plane) {
                    (Some(centres), Plane::Key) => {
                        let coded = [codes, scales];
                        centres.decode(
                            self.kernels,
                            which,
                            of,
                            skip,
                            coded,
                            target,
                            stride,
                            &mut self.scratch,
                        );
                    }
                    _ => self.kernels.decode(of, skip, codes, scales, target, stride),
                }
            }
        }
    }
}
