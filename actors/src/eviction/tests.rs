use super::*;

fn at(depth: u32) -> Touch {
    Touch { now_ms: 0, depth, request_blocks: 8 }
}

fn chain(evictor: &mut Evictor, blocks: &[u32]) {
    for (depth, &block) in blocks.iter().enumerate() {
        if evictor.contains(BlockId(block)) {
            evictor.touch(BlockId(block), at(depth as u32));
            evictor.hold(BlockId(block));
        } else {
            let parent = depth.checked_sub(1).map(|before| BlockId(blocks[before]));
            evictor.insert(BlockId(block), parent, u64::from(block), 0, at(depth as u32));
        }
    }
    for &block in blocks.iter().rev() {
        evictor.release(BlockId(block), 0);
    }
}

fn drain(evictor: &mut Evictor) -> Vec<u32> {
    std::iter::from_fn(|| {
        let victim = evictor.victim(0)?;
        evictor.remove(victim, 0);
        Some(victim.0)
    })
    .collect()
}

#[test]
fn lru_takes_leaves_first_and_parents_by_their_own_last_use() {
    let mut evictor = Evictor::new(EvictionPolicy::Lru, 16);
    chain(&mut evictor, &[0, 1, 2]);
    chain(&mut evictor, &[3, 4]);
    chain(&mut evictor, &[0, 5]);
    // 0 was used by the last request: it goes last, although its first child goes first.
    assert_eq!(drain(&mut evictor), [2, 1, 4, 3, 5, 0]);

    // A request that ends at 1 makes 1 younger than 3 and 4, without a child that would keep it.
    chain(&mut evictor, &[0, 1, 2]);
    chain(&mut evictor, &[3, 4]);
    chain(&mut evictor, &[0, 1]);
    chain(&mut evictor, &[6]);
    assert_eq!(drain(&mut evictor), [2, 4, 3, 1, 0, 6]);
    assert_eq!((evictor.cached(), evictor.unheld()), (0, 0));
}

#[test]
fn held_blocks_and_their_ancestors_stay() {
    let mut evictor = Evictor::new(EvictionPolicy::Lru, 16);
    chain(&mut evictor, &[0, 1, 2]);
    evictor.hold(BlockId(2));
    assert_eq!((evictor.victim(0), evictor.unheld(), evictor.cached()), (None, 2, 3));
    evictor.release(BlockId(2), 0);
    assert_eq!(drain(&mut evictor), [2, 1, 0]);
}

#[test]
fn a_victim_that_is_read_is_passed_and_comes_back() {
    let mut evictor = Evictor::new(EvictionPolicy::Lru, 16);
    for block in 0..4 {
        chain(&mut evictor, &[block]);
    }
    evictor.pass(BlockId(0), 0);
    assert_eq!(evictor.victim(0), Some(BlockId(1)));
    evictor.remove(BlockId(1), 0);
    assert_eq!(evictor.victim(0), Some(BlockId(0)), "one has gone: its turn again");
    for block in [0, 2, 3] {
        evictor.pass(BlockId(block), 0);
    }
    assert_eq!(evictor.victim(0), None, "all were passed");
    assert_eq!(evictor.victim(0), Some(BlockId(0)), "and are asked again");
    evictor.pass(BlockId(0), 0);
    evictor.hold(BlockId(0));
    evictor.pass(BlockId(2), 0);
    evictor.remove(BlockId(2), 0);
    assert_eq!(drain(&mut evictor), [3]);
    evictor.release(BlockId(0), 0);
    assert_eq!(drain(&mut evictor), [0]);
}

/// Whatever comes in, and in whatever order: all blocks can be evicted in the end, children before their parents.
#[test]
fn every_policy_bears_odd_input() {
    for policy in [EvictionPolicy::Auto, EvictionPolicy::Lru, EvictionPolicy::Lfu, EvictionPolicy::Slru] {
        for (now_ms, request_blocks, capacity) in
            [(0, 0, 0), (u64::MAX, u32::MAX, usize::MAX >> 16), (7, 3, 40)]
        {
            let mut evictor = Evictor::new(policy, 64);
            if capacity < 1 << 20 {
                evictor.set_capacity(capacity);
            }
            for round in 0..20_000u32 {
                let touch = |depth| Touch {
                    now_ms: now_ms ^ u64::from(round % 3),
                    depth: if round % 7 == 0 { u32::MAX - depth } else { depth },
                    request_blocks,
                };
                for depth in 0..4 {
                    let block = BlockId((round * 4 + depth) % 64);
                    if evictor.contains(block) {
                        evictor.touch(block, touch(depth));
                        continue;
                    }
                    let parent = depth.checked_sub(1).map(|_| BlockId(block.0 - 1));
                    evictor.insert(block, parent, u64::from(round % 5), round % 3, touch(depth));
                    evictor.release(block, touch(depth).now_ms);
                }
                for _ in 0..round % 6 {
                    let Some(victim) = evictor.victim(0) else { break };
                    evictor.remove(victim, 0);
                }
                if round % 1000 == 0 && capacity < 1 << 20 {
                    evictor.set_capacity(round as usize);
                }
            }
            let left = evictor.cached();
            assert_eq!(drain(&mut evictor).len(), left);
        }
    }
}

/// What a block costs: tables that have a place for each block, the ghosts of evicted ones, and what the learner has once.
#[test]
fn metadata_is_at_most_64_bytes_a_block() {
    for blocks in [1 << 17, 1 << 20] {
        let evictor = Evictor::new(EvictionPolicy::Auto, blocks);
        assert!(evictor.bytes() <= 64 * blocks, "{} bytes a block", evictor.bytes() as f64 / blocks as f64);
    }
    // The learner's own tables do not depend on the number of blocks.
    let evictor = Evictor::new(EvictionPolicy::Auto, 1000);
    assert!(evictor.bytes() <= 60 * 1000 + 512 * 1024, "{} bytes", evictor.bytes());
}
