//! What the oracle checks between answers and at the end.

use super::{Faults, Oracle};
use crate::batch::{BatchCacheOperations, Outcome};
use crate::block::BlockId;
use crate::device::Event;
use crate::testing::rig::Ticket;
use crate::testing::sim::LANES;
use crate::testing::values::tenant_of;

impl Oracle {
    /// One of the checks that are too slow for every tick.
    pub(super) fn check_something(&mut self) {
        match self.rng.below(3) {
            0 => self.rig.core().audit().expect("consistent"),
            1 => self.check_sequence(),
            _ => {
                let holdings = self.rig.core().holdings();
                let used = self.rig.config().token_budget.used();
                assert_eq!(used, holdings.tokens, "tokens counted and tokens there");
                assert_eq!(self.rig.open_sequences(), holdings.sequences as u64, "opened less closed");
            }
        }
    }

    /// Compares one sequence that nothing is under way for with its model, from the inside.
    fn check_sequence(&mut self) {
        if self.alive.is_empty() {
            return;
        }
        let at = self.alive[self.rng.below(self.alive.len())];
        let Some(tracked) = &self.tracked[at] else { return };
        let (Some(model), Some(handle)) = (&tracked.model, &tracked.handle) else { return };
        if tracked.doomed || !tracked.queue.is_empty() || model.is_closed() {
            return;
        }
        let core = self.rig.core();
        let layout = self.rules.layout;
        let blocks = {
            let state = handle.shared().state();
            assert_eq!(state.committed, model.committed(), "{}: committed", tracked.id);
            assert_eq!(state.window_start, model.window_start(), "{}: window", tracked.id);
            let stored = state.stored(state.committed);
            let positions = (0..stored).map(|at| state.position(at));
            assert!(positions.eq(model.positions()), "{}: positions", tracked.id);
            for layer in 0..layout.layers {
                assert_eq!(state.visible(layer), model.visible(layer), "{}: staged", tracked.id);
            }
            state.blocks.clone()
        };
        for (index, block) in blocks.iter().enumerate().filter(|(_, block)| **block != BlockId::DROPPED) {
            let place = core.blocks().place(*block).expect("a listed block has a place");
            let is_full = (index + 1) * layout.block_tokens <= model.stored() as usize;
            if is_full && core.block_key(tracked.id, index).is_some() {
                let offset = self.rig.config().pool.offset_bytes(place.class, place.slot);
                let decoded = self.rig.device.is_decoded(place.class, offset);
                assert!(!decoded, "{}: block {index} has a key, but was decoded", tracked.id);
            }
            let offset = self.rig.config().pool.offset_bytes(place.class, place.slot);
            let is_lossy =
                !place.format.is_raw() || self.rig.device.is_decoded(place.class, offset) && is_full;
            assert!(!is_lossy || !place.history.is_exact(), "{}: block {index} tells no history", tracked.id);
            if place.format.is_raw() {
                // Also the rows that it never wrote: they may be its own old ones or zero, never another tenant's.
                let start = self.rig.config().pool.offset_bytes(place.class, place.slot);
                let slot = start..start + layout.raw_bytes();
                let foreign = |x: f32| tenant_of(x).is_some_and(|tenant| tenant != model.tenant());
                if let Some(x) = self.rig.device.find_element(slot, foreign) {
                    panic!("{}: block {index} of tenant {} holds {x}", tracked.id, model.tenant());
                }
            }
        }
        for index in 0..model.stored() as usize / layout.block_tokens {
            let key = core.block_key(tracked.id, index);
            model.check_key(&self.rules, tracked.root, index, key).expect("keys");
        }
    }

    /// Lets everything that is under way come to its end.
    fn drain(&mut self) {
        let mut idle = 0;
        while idle < 3 {
            let before = (self.rig.device.counts().steps, self.rig.waiting(), self.rig.core().holdings());
            self.close_dropped();
            self.rig.flush();
            for lane in LANES {
                while self.rig.device.advance(lane) {}
                while self.rig.report(lane) {}
            }
            if self.rig.core().wants_to_seal() {
                self.rig.apply(Event::Seal);
            }
            self.collect();
            let after = (self.rig.device.counts().steps, self.rig.waiting(), self.rig.core().holdings());
            idle = if before == after { idle + 1 } else { 0 };
        }
        assert!(self.submitted.is_empty(), "{} submissions are never answered", self.submitted.len());
        let holdings = self.rig.core().holdings();
        assert_eq!(
            (holdings.submissions, holdings.in_flight, holdings.building, holdings.ready),
            (0, 0, 0, 0)
        );
    }

    /// Reads everything back, closes everything, and checks that nothing is left.
    pub(super) fn wind_down(&mut self) {
        self.drain();
        self.rig.core().audit().expect("consistent");
        self.read_all();
        self.look_away();
        self.seal_all();
        for at in self.alive.clone() {
            if let Some(tracked) = &mut self.tracked[at] {
                tracked.handle = None;
            }
        }
        self.drain();
        if let Some(at) = self.alive.first() {
            let tracked = self.tracked[*at].as_ref();
            let left = tracked
                .map(|t| (t.id, t.doomed, t.closing, t.model.is_some(), t.queue.len(), t.handle.is_some()));
            panic!("every sequence is closed, but not {left:?}; {:?}", self.rig.core().holdings());
        }
        let counters = *self.rig.core_mut().counters();
        self.report.count(&counters);
        self.rig.assert_empty();
    }

    /// However full the slab is: blocks that wait to be sealed can be, once nobody looks at anything. Not so where a launch has failed: a block
    /// that could not be re-encoded stays where it is, and with it the room that others were to have.
    fn seal_all(&mut self) {
        if self.faults != Faults::None {
            return;
        }
        self.rig.apply(Event::Seal);
        self.drain();
        let holdings = self.rig.core().holdings();
        assert_eq!(holdings.to_seal, 0, "blocks wait to be sealed for ever: {holdings:?}");
    }

    /// Reads every token of every sequence and layer that can be read.
    fn read_all(&mut self) {
        for at in self.alive.clone() {
            let Some(tracked) = &self.tracked[at] else { continue };
            let Some(model) = &tracked.model else { continue };
            if tracked.doomed || model.is_closed() {
                continue;
            }
            let mut batch = BatchCacheOperations::new();
            let mut reads = Vec::new();
            for layer in 0..self.rules.layout.layers {
                for tokens in model.readable(layer) {
                    batch.read(tracked.id, layer as u32, tokens.clone());
                    reads.push((layer, tokens));
                }
            }
            if reads.is_empty() {
                continue;
            }
            let ticket = self.rig.submit(batch);
            for ((layer, tokens), answer) in reads.into_iter().zip(self.wait(ticket)) {
                let Some(model) = self.tracked[at].as_ref().and_then(|tracked| tracked.model.as_ref()) else {
                    continue;
                };
                let Ok(Outcome::Read(buffer)) = answer else { panic!("it can be read, but: {answer:?}") };
                self.report.tokens_read += tokens.len() as u64;
                model.check_read(&self.rules.layout, layer, tokens, &buffer).expect("read back at the end");
            }
        }
    }

    fn wait(&mut self, ticket: Ticket) -> crate::batch::Results {
        loop {
            if let Some(results) = self.rig.take(ticket) {
                return results.expect("the reply was not dropped");
            }
            let steps = self.rig.device.counts().steps;
            self.rig.flush();
            let mut reported = false;
            for lane in LANES {
                while self.rig.device.advance(lane) {}
                while self.rig.report(lane) {
                    reported = true;
                }
            }
            assert!(reported || steps != self.rig.device.counts().steps, "a read is never answered");
        }
    }

    /// Time to seal. A core that says there is nothing to seal, with no slot under anybody's eyes, must not find anything.
    pub(super) fn seal(&mut self) {
        let core = self.rig.core();
        let before = core.holdings();
        let nothing = !core.wants_to_seal() && before.quarantined == 0 && !self.rig.config().deterministic;
        self.rig.apply(Event::Seal);
        if nothing {
            let sealing = self.rig.core().holdings().sealing;
            assert_eq!(sealing, before.sealing, "blocks could be sealed, but the core did not want to");
        }
    }

    /// Loses the device: everybody gets an answer or notices that there is none, and every permit comes back.
    pub(super) fn lose_device(&mut self) {
        self.rig.flush();
        let counters = *self.rig.core_mut().counters();
        self.report.count(&counters);
        self.rig.lose();
        self.report.lost_devices += 1;
        for submitted in std::mem::take(&mut self.submitted) {
            let taken = self.rig.take(submitted.ticket);
            assert!(
                matches!(taken, Some(Err(_))),
                "nobody answers any more, and nobody waits for ever: {taken:?}"
            );
        }
        // The views outlive the core, and their bytes stay.
        self.look_away();
        self.tracked.clear();
        self.rig.assert_empty();
    }
}
