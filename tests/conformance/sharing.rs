//! Forks: shared until somebody writes, independent ever after.

use crate::common::{Number, Rig, combos, eventually};

crate::conformance!(combos:
    forks_are_independent,
    a_fork_costs_no_block_until_somebody_writes,
    a_fork_outlives_its_parent,
    forks_of_forks_and_many_at_once,
    cutting_a_fork_leaves_the_others_alone,
    a_parent_may_commit_what_it_staged_before_the_fork,
);

async fn forks_are_independent<E: Number>(rig: Rig<E>) {
    for tokens in [1, rig.block(), 2 * rig.block() + 1, 3 * rig.block() - 1] {
        let (parent, mut parents) = rig.filled(tokens).await;
        let fork = parent.fork().await.unwrap();
        assert_ne!(fork.id(), parent.id());
        assert_eq!((fork.tenant(), fork.id().shard()), (parent.tenant(), parent.id().shard()));
        let mut forks = parents.clone();
        rig.check(&fork, &forks).await;
        rig.append(&parent, &mut parents, 1).await;
        rig.check(&fork, &forks).await;
        rig.append(&fork, &mut forks, rig.block() + 1).await;
        rig.check(&parent, &parents).await;
        rig.check(&fork, &forks).await;
        rig.append(&parent, &mut parents, 2 * rig.block()).await;
        rig.sealed(&parent).await;
        rig.sealed(&fork).await;
        rig.check(&parent, &parents).await;
        rig.check(&fork, &forks).await;
    }
    rig.finish().await;
}

async fn a_fork_costs_no_block_until_somebody_writes<E: Number>(rig: Rig<E>) {
    let used = async || rig.stats().await.total.blocks_used;
    let (parent, mut model) = rig.filled(2 * rig.block() + 1).await;
    rig.sealed(&parent).await;
    let before = used().await;
    assert_eq!(before, u64::from(model.len().div_ceil(rig.block())));
    let fork = parent.fork().await.unwrap();
    assert_eq!(used().await, before);
    assert_eq!(
        rig.cache.stats().tokens,
        2 * u64::from(model.len()),
        "forks count the tokens that they share"
    );
    let copies = rig.stats().await.total.copies_on_write;
    rig.append(&fork, &mut model, 1).await;
    assert_eq!(used().await, before + 1, "one block copied, or one new");
    let copied = u64::from(rig.block() > 1);
    assert_eq!(rig.stats().await.total.copies_on_write, copies + copied);
    drop((parent, fork));
    rig.finish().await;
}

async fn a_fork_outlives_its_parent<E: Number>(rig: Rig<E>) {
    let (parent, mut model) = rig.filled(2 * rig.block() + 1).await;
    let fork = parent.fork().await.unwrap();
    let open = rig.cache.stats().sequences_open;
    drop(parent);
    eventually("closing the parent", || rig.cache.stats().sequences_open == open - 1).await;
    rig.check(&fork, &model).await;
    rig.append(&fork, &mut model, rig.block()).await;
    rig.check(&fork, &model).await;
    drop(fork);
    rig.finish().await;
}

async fn forks_of_forks_and_many_at_once<E: Number>(rig: Rig<E>) {
    let (root, model) = rig.filled(rig.block() + 2).await;
    let mut family = vec![(root, model)];
    for _ in 0..2 {
        let mut grown = Vec::new();
        for (parent, model) in &family {
            let forks = parent.fork_many(3).await.unwrap();
            assert_eq!(forks.len(), 3);
            grown.extend(forks.into_iter().map(|fork| (fork, model.clone())));
        }
        for (at, (fork, model)) in grown.iter_mut().enumerate() {
            rig.append(fork, model, 1 + at as u32 % 3).await;
        }
        family.append(&mut grown);
    }
    assert_eq!(family.len(), 16);
    assert_eq!(rig.cache.stats().sequences_open, 16);
    for (sequence, model) in &family {
        rig.check(sequence, model).await;
    }
    // Every other one goes, in the middle of everything.
    let mut at = 0;
    family.retain(|_| {
        at += 1;
        at % 2 == 0
    });
    for (sequence, model) in &mut family {
        rig.append(sequence, model, 2).await;
        rig.check(sequence, model).await;
    }
    drop(family);
    rig.finish().await;
}

async fn cutting_a_fork_leaves_the_others_alone<E: Number>(rig: Rig<E>) {
    let (parent, mut parents) = rig.filled(3 * rig.block()).await;
    // Once before the blocks are sealed, if it is quick enough, and once after.
    for _ in 0..2 {
        let fork = parent.fork().await.unwrap();
        let mut forks = parents.clone();
        let cut = parents.len() - rig.block() / 2 - 1;
        fork.truncate(cut).await.unwrap();
        forks.truncate(cut);
        rig.append(&fork, &mut forks, 1).await;
        rig.check(&parent, &parents).await;
        rig.check(&fork, &forks).await;
        rig.append(&parent, &mut parents, 1).await;
        rig.check(&fork, &forks).await;
        rig.sealed(&parent).await;
        rig.sealed(&fork).await;
        rig.check(&parent, &parents).await;
        rig.check(&fork, &forks).await;
    }
    drop(parent);
    rig.finish().await;
}

/// The tail block is shared while it holds staged tokens of the parent's, and may become full under the fork's feet.
async fn a_parent_may_commit_what_it_staged_before_the_fork<E: Number>(rig: Rig<E>) {
    for staged in [1, rig.block() - 1, rig.block(), rig.block() + 1] {
        if staged == 0 {
            continue;
        }
        let (parent, mut parents) = rig.filled(rig.block() + 1).await;
        let new = rig.tokens(staged);
        rig.stage_all(&parent, &new).await;
        let fork = parent.fork().await.unwrap();
        let before = parents.len();
        parent.commit(&new.ids).await.unwrap();
        parents.push(&new);
        // The fork shares the block that the parent fills up.
        let mut forks = parents.clone();
        forks.truncate(before);
        rig.check(&parent, &parents).await;
        rig.check(&fork, &forks).await;
        rig.append(&fork, &mut forks, 2).await;
        rig.check(&parent, &parents).await;
        rig.append(&parent, &mut parents, 2).await;
        rig.sealed(&parent).await;
        rig.sealed(&fork).await;
        rig.check(&parent, &parents).await;
        rig.check(&fork, &forks).await;
    }
    rig.finish().await;
}
