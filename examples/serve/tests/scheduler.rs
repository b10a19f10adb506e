//! The scheduler by itself: single rules, and random loads over a cache that is a number.

use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

const LIMITS: Limits = Limits { running_max: 4, step_tokens: 40, chunk_tokens: 32 };

fn with_prompts(prompts: &[u32]) -> Scheduler {
    let mut scheduler = Scheduler::new(LIMITS);
    for (at, &tokens) in prompts.iter().enumerate() {
        scheduler.arrived(RequestId(at as u64), tokens);
    }
    while let Some((id, _)) = scheduler.next_to_open() {
        scheduler.opened(id, 0);
    }
    scheduler
}

fn planned(id: u64, position: u32, tokens: u32, samples: bool) -> Planned {
    Planned { id: RequestId(id), position, tokens, samples }
}

#[test]
fn decodes_come_first_and_prompts_share_what_is_left() {
    let mut scheduler = with_prompts(&[100, 1, 100, 20]);
    assert_eq!(scheduler.plan(), [planned(1, 0, 1, true), planned(0, 0, 32, false), planned(2, 0, 7, false)]);
    scheduler.computed(RequestId(0), 32);
    scheduler.computed(RequestId(1), 1);
    scheduler.sampled(RequestId(1));
    assert_eq!(
        scheduler.plan(),
        [planned(1, 1, 1, true), planned(0, 32, 32, false), planned(2, 0, 7, false)]
    );
}

#[test]
fn what_is_cached_is_not_computed_but_the_last_token_is() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.arrived(RequestId(0), 70);
    scheduler.opened(RequestId(0), 64);
    assert_eq!(scheduler.plan(), [planned(0, 64, 6, true)]);
    scheduler.arrived(RequestId(1), 64);
    scheduler.opened(RequestId(1), 64);
    assert_eq!(scheduler.plan()[0], planned(1, 63, 1, true));
}

#[test]
fn no_more_run_than_may_and_the_queue_is_in_order() {
    let mut scheduler = with_prompts(&[5; 6]);
    assert_eq!((scheduler.running(), scheduler.waiting()), (4, 2));
    assert_eq!(scheduler.next_to_open(), None);
    scheduler.left(RequestId(2));
    assert_eq!(scheduler.next_to_open(), Some((RequestId(4), 5)));
}

#[test]
fn the_youngest_makes_way_and_is_first_in_the_queue() {
    let mut scheduler = with_prompts(&[5; 6]);
    assert_eq!(scheduler.no_room(&[RequestId(0)]), NoRoom::Preempted(vec![RequestId(3)]));
    assert_eq!(scheduler.next_to_open(), Some((RequestId(3), 5)));
    // However many ask, the oldest stays.
    let all = [RequestId(0), RequestId(1), RequestId(2)];
    assert_eq!(scheduler.no_room(&all), NoRoom::Preempted(vec![RequestId(2), RequestId(1)]));
    assert_eq!(scheduler.running(), 1);
}

#[test]
fn a_job_that_does_not_fit_alone_is_given_up() {
    let mut scheduler = with_prompts(&[5]);
    for _ in 1..ATTEMPTS_ALONE_MAX {
        assert_eq!(scheduler.no_room(&[RequestId(0)]), NoRoom::Retry(RequestId(0)));
    }
    assert_eq!(scheduler.no_room(&[RequestId(0)]), NoRoom::Hopeless(RequestId(0)));
    assert_eq!((scheduler.running(), scheduler.plan().len()), (0, 0));

    scheduler.arrived(RequestId(1), 500);
    for _ in 1..ATTEMPTS_ALONE_MAX {
        assert_eq!(scheduler.not_opened(RequestId(1)), NoRoom::Retry(RequestId(1)));
    }
    assert_eq!(scheduler.not_opened(RequestId(1)), NoRoom::Hopeless(RequestId(1)));
    assert_eq!(scheduler.waiting(), 0);
}

#[test]
fn a_queue_behind_a_running_job_waits_for_ever_without_being_given_up() {
    let mut scheduler = with_prompts(&[5]);
    scheduler.arrived(RequestId(1), 500);
    for _ in 0..10 * ATTEMPTS_ALONE_MAX {
        assert_eq!(scheduler.not_opened(RequestId(1)), NoRoom::Retry(RequestId(1)));
    }
    assert_eq!(scheduler.waiting(), 1);
}

#[test]
fn a_parked_job_is_computed_again_with_all_it_has() {
    let mut scheduler = with_prompts(&[5, 5]);
    scheduler.computed(RequestId(0), 5);
    scheduler.sampled(RequestId(0));
    scheduler.park(RequestId(0));
    assert_eq!((scheduler.parked(), scheduler.plan().len()), (1, 1));
    assert_eq!(scheduler.next_to_open(), None);
    scheduler.unpark(RequestId(0));
    assert_eq!(scheduler.next_to_open(), Some((RequestId(0), 6)));
}

#[test]
fn limits_leave_room_for_a_chunk() {
    let limits = Limits { running_max: 64, step_tokens: 1, chunk_tokens: 32 }.checked();
    assert_eq!(limits.step_tokens, 96);
    assert_eq!(Limits { running_max: 0, step_tokens: 0, chunk_tokens: 0 }.checked().step_tokens, 2);
}

/// A made-up job: what it is to generate, and blocks that it holds.
#[derive(Clone, Copy)]
struct Load {
    prompt: u32,
    generate: u32,
    generated: u32,
    blocks: u32,
}

const BLOCK: u32 = 32;

fn blocks(tokens: u32) -> u32 {
    tokens.div_ceil(BLOCK)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Every job that fits alone ends, in any load, with a cache that is far too small for all; nothing is computed
    /// twice within one opening, no step is too large, and nobody who decodes is left out of one.
    #[test]
    fn everybody_ends(seed in any::<u64>(), jobs in 1usize..24, room in 8u32..40) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut scheduler = Scheduler::new(LIMITS);
        let mut loads: BTreeMap<RequestId, Load> = BTreeMap::new();
        let (mut arrived, mut free, mut steps) = (0u64, room, 0u32);
        while arrived < jobs as u64 || !loads.is_empty() {
            steps += 1;
            prop_assert!(steps < 200_000, "no end: {scheduler:?}");
            if arrived < jobs as u64 && rng.random_bool(0.3) {
                let total = rng.random_range(2..room * BLOCK);
                let prompt = rng.random_range(1..total);
                let id = RequestId(arrived);
                arrived += 1;
                loads.insert(id, Load { prompt, generate: total - prompt, generated: 0, blocks: 0 });
                scheduler.arrived(id, prompt);
            }
            // Somebody stops reading, or reads again, or goes away.
            if let Some(id) = some(&mut rng, &loads) {
                match rng.random_range(0..60) {
                    0 => {
                        scheduler.park(id);
                        if scheduler.parked.contains_key(&id) {
                            free += std::mem::take(&mut loads.get_mut(&id).unwrap().blocks);
                        }
                    }
                    1 => {
                        scheduler.left(id);
                        free += loads.remove(&id).unwrap().blocks;
                    }
                    _ => scheduler.unpark(id),
                }
            }
            while let Some((id, tokens)) = scheduler.next_to_open() {
                let load = loads.get_mut(&id).unwrap();
                prop_assert_eq!(tokens, load.prompt + load.generated);
                if blocks(tokens) > free {
                    let hopeless = matches!(scheduler.not_opened(id), NoRoom::Hopeless(_));
                    prop_assert!(!hopeless, "{} of {} free", free, room);
                    break;
                }
                load.blocks = blocks(tokens);
                free -= load.blocks;
                scheduler.opened(id, 0);
            }
            step(&mut scheduler, &mut loads, &mut free)?;
        }
        prop_assert_eq!((free, scheduler.waiting(), scheduler.running(), scheduler.parked()), (room, 0, 0, 0));
    }
}

fn some(rng: &mut SmallRng, loads: &BTreeMap<RequestId, Load>) -> Option<RequestId> {
    let at = rng.random_range(0..loads.len().max(1));
    loads.keys().nth(at).copied()
}

fn step(
    scheduler: &mut Scheduler,
    loads: &mut BTreeMap<RequestId, Load>,
    free: &mut u32,
) -> Result<(), TestCaseError> {
    let plan = scheduler.plan();
    prop_assert!(plan.iter().map(|chunk| chunk.tokens).sum::<u32>() <= scheduler.limits.step_tokens);
    prop_assert!(plan.iter().all(|chunk| chunk.tokens <= LIMITS.chunk_tokens));
    for (id, job) in &scheduler.running {
        let decodes = job.tokens - job.computed == 1;
        prop_assert!(!decodes || plan.iter().any(|chunk| chunk.id == *id && chunk.samples));
    }
    let oldest = scheduler.running.keys().next().copied();
    let mut refused = Vec::new();
    for chunk in plan {
        let load = loads.get_mut(&chunk.id).unwrap();
        let needed = blocks(chunk.position + chunk.tokens).saturating_sub(load.blocks);
        if needed > *free {
            refused.push(chunk.id);
            continue;
        }
        *free -= needed;
        load.blocks += needed;
        scheduler.computed(chunk.id, chunk.tokens);
        if chunk.samples {
            load.generated += 1;
            if load.generated == load.generate {
                *free += load.blocks;
                loads.remove(&chunk.id);
                scheduler.left(chunk.id);
            } else {
                scheduler.sampled(chunk.id);
            }
        }
    }
    if !refused.is_empty() && scheduler.running() > 0 {
        match scheduler.no_room(&refused) {
            NoRoom::Preempted(ids) => {
                for id in ids {
                    prop_assert!(Some(id) != oldest);
                    *free += std::mem::take(&mut loads.get_mut(&id).unwrap().blocks);
                }
            }
            NoRoom::Retry(_) => {}
            NoRoom::Hopeless(id) => prop_assert!(false, "{id:?} was given up"),
        }
    }
    Ok(())
}
