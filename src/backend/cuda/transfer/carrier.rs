//! A lane's transfers: takes them out of launches, hands them to an engine, and counts those that are done.

use std::sync::Arc;

use kv_cache_actors::memory::{LaneKind, Launch, Step};

use super::super::Slab;
use super::super::driver::{DriverError, Event};
use super::super::kernels::Kernels;
use super::calibrate;
use super::engine::{Engine, Region, Transfer};
use super::paths::Config;
use super::plan::{Calibration, Direction, Move};

/// The engine of a copy lane. Transfers finish in the order of their launches.
pub(in super::super) struct Carrier {
    engine: Engine,
    direction: Direction,
    submitted: u64,
    done: u64,
}

impl Carrier {
    /// A carrier for a copy lane of a device with a host tier. Moves between tiers go over no other lane.
    pub(in super::super) fn open(
        lane: LaneKind,
        slab: &Arc<Slab>,
        kernels: &Arc<Kernels>,
        calibrate: bool,
    ) -> Result<Option<Carrier>, DriverError> {
        let direction = match lane {
            LaneKind::Compute => return Ok(None),
            LaneKind::Upload => Direction::ToDevice,
            LaneKind::Download => Direction::ToHost,
        };
        if !slab.has_host_tier() {
            return Ok(None);
        }
        let (gpu, config) = (slab.gpu(), Config::default());
        let calibration = match calibrate {
            true => calibrate::known(gpu, kernels, direction, config)?,
            false => Calibration::TYPICAL,
        };
        let course = (direction, slab.traffic.clone());
        let engine = Engine::open(gpu, kernels.clone(), course, Region::tiers(slab), config, calibration)?;
        Ok(Some(Carrier { engine, direction, submitted: 0, done: 0 }))
    }

    /// Takes the transfers out of a launch, and begins them.
    pub(in super::super) fn take(&mut self, slab: &Slab, launch: &mut Launch) {
        let mut moves = Vec::new();
        launch.steps.retain(|step| {
            let Step::Transfer { from_offset, to_offset, bytes } = *step else { return true };
            let (from, to) = (slab.address_of(from_offset), slab.address_of(to_offset));
            let (device, host) = match self.direction {
                Direction::ToDevice => (to, from),
                Direction::ToHost => (from, to),
            };
            moves.push(Move { device, host, bytes });
            false
        });
        if moves.is_empty() {
            return;
        }
        // The engine's start with the first bytes is soonest if they come in host order.
        moves.sort_unstable_by_key(|one| one.host);
        self.submitted += 1;
        let bytes = moves.iter().map(|one| one.bytes).sum();
        self.engine.submit(Transfer { moves, bytes, after: None, method: None });
    }

    /// Transfers that were taken.
    pub(in super::super) fn submitted(&self) -> u64 {
        self.submitted
    }

    /// Transfers that are done.
    pub(in super::super) fn done(&self) -> u64 {
        self.done
    }

    /// Looks what is done, and enqueues what follows.
    pub(in super::super) fn poll(&mut self) -> Result<(), DriverError> {
        if self.engine.is_idle() {
            return Ok(());
        }
        let mut finished = Vec::new();
        self.engine.poll(&mut finished)?;
        self.done += finished.len() as u64;
        Ok(())
    }

    /// An event for whoever is about to sleep. None if nothing is on its way.
    pub(in super::super) fn sleep(&self) -> Option<Result<Event, DriverError>> {
        (!self.engine.is_idle()).then(|| self.engine.record())
    }
}
