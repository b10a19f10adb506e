//! Random operations against a model that keeps everything in plain vectors and looks at all of it every time.

use super::*;

const BLOCKS: u32 = 24;
const TENANTS: u32 = 3;

#[derive(Clone)]
struct Entry {
    parent: Option<u32>,
    tenant: u32,
    holders: bool,
    used: u64,
    retention: Retention,
    since_ms: u64,
}

struct Model {
    entries: Vec<Option<Entry>>,
    passed: Vec<u32>,
    protected: [bool; TENANTS as usize],
    uses: u64,
}

impl Model {
    fn is_candidate(&self, block: u32) -> bool {
        let continues =
            |entry: &Option<Entry>| entry.as_ref().is_some_and(|entry| entry.parent == Some(block));
        self.entries[block as usize].as_ref().is_some_and(|entry| !entry.holders)
            && !self.entries.iter().any(continues)
    }

    /// Candidates that have not been passed.
    fn ready(&self) -> Vec<u32> {
        (0..BLOCKS).filter(|block| self.is_candidate(*block) && !self.passed.contains(block)).collect()
    }

    fn entry(&self, block: u32) -> &Entry {
        self.entries[block as usize].as_ref().unwrap()
    }

    fn use_now(&mut self) -> u64 {
        self.uses += 1;
        self.uses
    }

    /// 0 before ordinary blocks, 1 ordinary, 2 after them; and the priority of those that are not.
    fn band(&self, block: u32, now_ms: u64) -> (u8, u8) {
        let Entry { retention, since_ms, .. } = *self.entry(block);
        let mut priority = i64::from(retention.priority);
        if let Some(until_ms) = retention.until_ms {
            let step_ms = until_ms.saturating_sub(since_ms) / 8;
            if now_ms >= until_ms {
                priority = 50;
            } else if retention.decay && step_ms > 0 {
                priority = 50 + (priority - 50) * (8 - ((now_ms - since_ms) / step_ms).min(8)) as i64 / 8;
            }
        }
        match priority {
            50 => (1, 50),
            below if below < 50 => (0, below as u8),
            above => (2, above as u8),
        }
    }
}

fn run(policy: EvictionPolicy, seed: u64) {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut draw = move |below: u32| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % u64::from(below)) as u32
    };
    let mut evictor = Evictor::new(policy, BLOCKS as usize);
    let mut model = Model {
        entries: vec![None; BLOCKS as usize],
        passed: Vec::new(),
        protected: [false; TENANTS as usize],
        uses: 0,
    };
    let mut now_ms = 0;
    for _ in 0..8000 {
        now_ms += u64::from(draw(3));
        let block = draw(BLOCKS);
        let id = BlockId(block);
        let touch = Touch { now_ms, depth: draw(5), request_blocks: draw(6) };
        let entry = model.entries[block as usize].clone();
        assert_eq!(evictor.contains(id), entry.is_some());
        match (draw(16), entry) {
            (0..=5, None) => {
                let parent = (draw(4) > 0).then(|| draw(BLOCKS)).filter(|parent| *parent != block);
                let tenant = draw(TENANTS);
                evictor.insert(id, parent.map(BlockId), u64::from(draw(60)), tenant, touch);
                let parent = parent.filter(|parent| model.entries[*parent as usize].is_some());
                model.passed.retain(|passed| Some(*passed) != parent);
                let (retention, used) = (Retention::default(), model.use_now());
                model.entries[block as usize] =
                    Some(Entry { parent, tenant, holders: true, used, retention, since_ms: 0 });
            }
            (0..=2, Some(entry)) if !entry.holders => {
                evictor.touch(id, touch);
                evictor.hold(id);
                model.passed.retain(|passed| *passed != block);
                model.entries[block as usize].as_mut().unwrap().holders = true;
            }
            (0..=5, Some(entry)) if entry.holders => {
                evictor.release(id, now_ms);
                let used = model.use_now();
                let entry = model.entries[block as usize].as_mut().unwrap();
                (entry.holders, entry.used) = (false, used);
            }
            (6, Some(_)) => {
                let until_ms = (draw(3) > 0).then(|| now_ms + u64::from(draw(60)));
                let retention = Retention { priority: draw(101) as u8, until_ms, decay: draw(2) == 0 };
                evictor.set_retention(id, retention);
                let entry = model.entries[block as usize].as_mut().unwrap();
                // A hint counts from the last time that the evictor was told.
                (entry.retention, entry.since_ms) = (retention, evictor.now_ms);
            }
            (7, _) => {
                let tenant = draw(TENANTS);
                let is_protected = draw(2) == 0;
                evictor.protect(tenant, is_protected);
                model.protected[tenant as usize] = is_protected;
            }
            (8..=10, _) => {
                let tenant = draw(TENANTS);
                let mut ready = model.ready();
                ready.retain(|block| model.entry(*block).tenant == tenant);
                let victim = evictor.victim_of(tenant, now_ms);
                match victim {
                    None => {
                        assert!(ready.is_empty());
                        model.passed.clear();
                    }
                    Some(BlockId(victim)) => {
                        assert!(ready.contains(&victim));
                        let oldest = ready.iter().min_by_key(|block| model.entry(**block).used).copied();
                        assert!(ready.len() > 8 || oldest == Some(victim));
                    }
                }
                evict(&mut evictor, &mut model, victim, draw(3), now_ms);
            }
            (11.., _) => {
                let mut ready = model.ready();
                ready.retain(|block| !model.protected[model.entry(*block).tenant as usize]);
                let victim = evictor.victim(now_ms);
                let Some(BlockId(first)) = victim else {
                    assert!(ready.is_empty(), "{ready:?} can go");
                    model.passed.clear();
                    continue;
                };
                assert!(ready.contains(&first));
                // Blocks of a tenant that has just lost its protection come back a few at a time.
                ready.retain(|block| !evictor.nodes[*block as usize].is(PARKED));
                let order = |block: &u32| {
                    let used = model.entry(*block).used;
                    let (band, priority) = model.band(*block, now_ms);
                    (band, priority, if policy == EvictionPolicy::Lru || band != 1 { used } else { 0 })
                };
                let least = ready.iter().map(order).min();
                assert_eq!(least, Some(order(&first)));
                evict(&mut evictor, &mut model, victim, draw(3), now_ms);
            }
            _ => (),
        }
        let cached = model.entries.iter().flatten();
        assert_eq!(evictor.cached(), cached.clone().count());
        assert_eq!(evictor.unheld(), cached.filter(|entry| !entry.holders).count());
    }
}

/// Removes, passes or leaves the victim.
fn evict(evictor: &mut Evictor, model: &mut Model, victim: Option<BlockId>, choice: u32, now_ms: u64) {
    let Some(victim) = victim else { return };
    match choice {
        0 => (),
        1 => {
            evictor.pass(victim, now_ms);
            model.passed.push(victim.0);
        }
        _ => {
            evictor.remove(victim, now_ms);
            model.entries[victim.0 as usize] = None;
            if !model.passed.is_empty() {
                model.passed.remove(0);
            }
        }
    }
}

#[test]
fn every_policy_agrees_with_the_model() {
    for policy in [EvictionPolicy::Lru, EvictionPolicy::Auto, EvictionPolicy::Lfu, EvictionPolicy::Slru] {
        for seed in 0..16 {
            println!("{policy:?}, seed {seed}");
            run(policy, seed);
        }
    }
}
