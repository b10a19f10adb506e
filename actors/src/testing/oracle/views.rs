//! Views: slots pinned by somebody outside of the core, whose bytes must not change for as long as the pin is held.

use super::Oracle;
use crate::block::{BlockId, Place};
use crate::format::FormatLayout;
use crate::geometry::Plane;
use crate::memory::ReadBuffer;
use crate::slot::SlotPin;

/// Most views held at once.
const VIEWS_MAX: usize = 6;

/// Some tokens of one layer, pinned in place.
pub(super) struct View {
    pieces: Vec<std::ops::Range<usize>>,
    bytes: Vec<u8>,
    _pins: Vec<SlotPin>,
}

impl Oracle {
    /// Looks at something, or stops looking.
    pub(super) fn look(&mut self) {
        if self.views.len() >= VIEWS_MAX || !self.views.is_empty() && self.rng.one_in(2) {
            let at = self.rng.below(self.views.len());
            let view = self.views.swap_remove(at);
            self.check_view(&view);
        } else if let Some(view) = self.view() {
            self.check_view(&view);
            self.views.push(view);
        }
    }

    /// Drops all views, after a last look.
    pub(super) fn look_away(&mut self) {
        for view in std::mem::take(&mut self.views) {
            self.check_view(&view);
        }
    }

    fn check_view(&mut self, view: &View) {
        let mut bytes = &view.bytes[..];
        for piece in &view.pieces {
            let (these, rest) = bytes.split_at(piece.len());
            assert!(
                self.rig.device.has_bytes(piece.clone(), these),
                "bytes {piece:?} have changed under a view"
            );
            bytes = rest;
        }
        self.report.views += 1;
    }

    /// Pins what one layer of some sequence shows, as a reader outside of the device thread does.
    fn view(&mut self) -> Option<View> {
        let at = *self.alive.get(self.rng.below(self.alive.len().max(1)))?;
        let tracked = self.tracked[at].as_ref()?;
        let (layout, pool) = (self.rules.layout, self.rig.config().pool);
        let layer = self.rng.below(layout.layers);
        let shared = tracked.handle.as_ref()?.shared();
        let state = shared.state();
        let visible = state.visible(layer);
        let dropped = state.dropped();
        let core = self.rig.core();
        let mut view = View { pieces: Vec::new(), bytes: Vec::new(), _pins: Vec::new() };
        // All of it if nothing is under way: then it is known what it must show.
        let settled = tracked.queue.is_empty();
        let mut shown = ReadBuffer::new(&layout, visible as usize);
        for (index, inside) in state.pieces(&layout, 0..visible) {
            let block = state.blocks[index];
            let first = (index * layout.block_tokens + inside.start) as u32;
            if block == BlockId::DROPPED || dropped.contains(&first) {
                continue;
            }
            let place = core.blocks().place(block).expect("a listed block has a place");
            let pin = core.blocks().pool().table().pin(place.slot, place.generation);
            view._pins.push(pin.expect("nothing moves while nobody else runs"));
            let slot = pool.offset_bytes(place.class, place.slot);
            for plane in Plane::BOTH {
                for head in 0..layout.kv_heads {
                    let rows = head * layout.block_tokens + inside.start;
                    let rows = rows..rows + inside.len();
                    for piece in row_bytes(&layout, &place, slot, layer, plane, rows) {
                        self.rig.device.copy_bytes(piece.clone(), &mut view.bytes);
                        view.pieces.push(piece);
                    }
                    if settled && place.format.is_raw() {
                        let bytes = &view.bytes[view.bytes.len() - inside.len() * layout.row_bytes(plane)..];
                        for (i, row) in bytes.chunks_exact(layout.row_bytes(plane)).enumerate() {
                            let to = ((first as usize + i) * layout.kv_heads + head) * row.len();
                            shown.plane_mut(plane)[to..to + row.len()].copy_from_slice(row);
                        }
                    }
                }
            }
            if settled
                && place.format.is_raw()
                && let Some(model) = &tracked.model
            {
                let stored = first..first + inside.len() as u32;
                let part = part(&shown, &layout, &stored);
                let positions = stored.map(|at| state.position(at));
                model.check_read(&layout, layer, positions, &part).expect("a view shows what was written");
            }
        }
        drop(state);
        Some(view)
    }
}

/// Some tokens of a buffer.
fn part(
    buffer: &ReadBuffer,
    layout: &crate::geometry::BlockLayout,
    tokens: &std::ops::Range<u32>,
) -> ReadBuffer {
    let mut out = ReadBuffer::new(layout, tokens.len());
    for (plane, from) in [(Plane::Key, buffer.keys.bytes()), (Plane::Value, buffer.values.bytes())] {
        let token = layout.token_bytes(plane);
        out.plane_mut(plane)
            .copy_from_slice(&from[tokens.start as usize * token..tokens.end as usize * token]);
    }
    out
}

/// Where rows of one plane of a block lie.
fn row_bytes(
    layout: &crate::geometry::BlockLayout,
    place: &Place,
    slot: usize,
    layer: usize,
    plane: Plane,
    rows: std::ops::Range<usize>,
) -> impl Iterator<Item = std::ops::Range<usize>> {
    let (codes, scales) = FormatLayout::new(place.format, layout).places(layout, layer, plane, &rows);
    [codes, scales]
        .into_iter()
        .filter(|range| !range.is_empty())
        .map(move |range| slot + range.start..slot + range.end)
}
