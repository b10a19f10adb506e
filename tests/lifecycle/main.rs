//! Beginnings and ends: futures dropped half-way, shutdown, handles that outlive each other, and devices that are lost.

#[path = "../common/mod.rs"]
mod common;

mod cancelling;
mod dropping;
mod losing_a_device;
mod shutting_down;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use common::{Combo, Model, PATIENCE, Rig, SETUPS, Tokens, eventually, geometry, whole_case, within};
use kv_cache::*;

type Numbers = f32;

fn combo(setup: usize) -> Combo {
    Combo {
        setup: &SETUPS[setup],
        format: Format::Int8.into(),
        geometry: geometry((5, 2, 2, 8, 6), ElementType::F32),
    }
}

async fn rig(setup: usize, change: impl FnOnce(CacheBuilder) -> CacheBuilder) -> Rig<Numbers> {
    let combo = combo(setup);
    Rig::new(&combo, change(combo.builder().unwrap())).await
}
