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
            evictor.insert(BlockId(block), parent, u64::from(block), at(depth as u32));
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
