//! Futures dropped half-way, at every point of every operation.

use super::*;

/// Polls up to `polls` times, letting everybody else run in between, and says whether it finished.
async fn poll_some<F: Future>(future: F, polls: usize) -> Option<F::Output> {
    let mut future = Box::pin(future);
    for _ in 0..polls {
        let once = std::future::poll_fn(|context| Poll::Ready(future.as_mut().poll(context)));
        if let Poll::Ready(output) = once.await {
            return Some(output);
        }
        tokio::task::yield_now().await;
    }
    None
}

type Case<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Every kind of operation, on a sequence of 7 tokens. Of the text the first two blocks are cached.
fn operations<'a>(
    rig: &'a Rig<Numbers>,
    sequence: &'a Sequence,
    new: &'a Tokens<Numbers>,
    text: &'a Tokens<Numbers>,
) -> Vec<(&'static str, Case<'a>)> {
    let cache = &rig.cache;
    let prompt = move || OpenOptions::default().prompt(&text.ids).reserve_tokens(20);
    let batch = move || {
        BatchCacheOperations::new()
            .open("tenant", prompt())
            .append(sequence, &new.ids, &new.keys, &new.values)
            .read(sequence, 0, 0..7)
            .fork(sequence, 3)
            .truncate(sequence, 6)
    };
    vec![
        (
            "open",
            Box::pin(async { drop(cache.open("tenant", OpenOptions::default().reserve_tokens(9)).await) }),
        ),
        (
            "open with a prompt",
            Box::pin(async move {
                if let Ok(open) = cache.open("tenant", prompt()).await {
                    let mut model = rig.model();
                    model.push_some(text, 10);
                    rig.check(&open, &model).await;
                }
            }),
        ),
        (
            "append what others append",
            Box::pin(async move {
                let two = [cache.open("tenant", prompt()).await, cache.open("tenant", prompt()).await];
                for open in two.iter().flatten() {
                    let rest = text.slice(open.len() as usize..text.len());
                    drop(open.append(&rest.ids, &rest.keys, &rest.values).await);
                }
            }),
        ),
        ("append", Box::pin(async { drop(sequence.append(&new.ids, &new.keys, &new.values).await) })),
        ("stage", Box::pin(async { drop(sequence.stage(1, new.keys_of(1), new.values_of(1)).await) })),
        (
            "commit",
            Box::pin(async {
                // Of what stands staged in both layers by then.
                drop(sequence.stage(0, new.keys_of(0), new.values_of(0)).await);
                drop(sequence.stage(1, new.keys_of(1), new.values_of(1)).await);
                drop(sequence.commit(&new.ids[..2]).await);
            }),
        ),
        ("read", Box::pin(async { drop(sequence.read::<Numbers>(1, 0..7).await) })),
        ("fork", Box::pin(async { drop(sequence.fork().await) })),
        ("fork_many", Box::pin(async { drop(sequence.fork_many(5).await) })),
        ("truncate", Box::pin(async { drop(sequence.truncate(3).await) })),
        (
            "close",
            Box::pin(async {
                if let Ok(fork) = sequence.fork().await {
                    drop(fork.close().await);
                }
            }),
        ),
        ("submit", Box::pin(async move { drop(cache.submit(batch()).await) })),
        (
            "try_submit",
            Box::pin(async move {
                if let Ok(results) = cache.try_submit(batch()) {
                    drop(results.await);
                }
            }),
        ),
    ]
}

/// What the sequence may hold: some prefix of the base, then some prefix of the new tokens. Nothing half done.
fn consistent(model: &Model<Numbers>, new: &Tokens<Numbers>, sequence: &Sequence) -> Model<Numbers> {
    let len = sequence.len();
    let mut expected = model.clone();
    match len {
        // Truncated, or as it was.
        3 | 6 | 7 => expected.truncate(len),
        // Committed two, or appended all.
        9 => expected.push_some(new, 2),
        13 => expected.push(new),
        // Appended and then truncated.
        other => panic!("{other} tokens"),
    }
    expected
}

async fn run(setup: usize, max_jobs: usize) {
    let rig = rig(setup, |b| b.max_in_flight(max_jobs, 1 << 20)).await;
    let kinds = {
        let (sequence, _) = rig.filled(7).await;
        let (new, text) = (rig.tokens(6), rig.text(17));
        operations(&rig, &sequence, &new, &text).len()
    };
    for kind in 0..kinds {
        for polls in 0..12 {
            for crowded in [false, true] {
                let (sequence, model) = rig.filled(7).await;
                let (new, text) = (rig.tokens(6), rig.text(17));
                rig.shared(&text.slice(0..12)).await.0.close().await.unwrap();
                let (name, operation) = operations(&rig, &sequence, &new, &text).swap_remove(kind);
                let what = format!("{name} after {polls} polls");
                // Somebody else holds permits and waits for some, so that this one has to wait as well.
                let other = rig.open().await;
                let crowd_tokens = rig.tokens(1);
                let crowd: Vec<_> = (0..if crowded { max_jobs + 2 } else { 0 })
                    .map(|_| {
                        let append =
                            other.append(&crowd_tokens.ids, &crowd_tokens.keys, &crowd_tokens.values);
                        let mut append = Box::pin(append);
                        let mut context = Context::from_waker(Waker::noop());
                        assert!(append.as_mut().poll(&mut context).is_pending());
                        append
                    })
                    .collect();
                poll_some(operation, polls).await;
                for append in crowd {
                    within(&what, append).await.unwrap();
                }
                // Stands behind whatever of the operation is still in flight.
                within(&what, sequence.read::<Numbers>(0, 0..0)).await.unwrap();
                // Usable, and as if the operation had been carried out or never asked for.
                let expected = consistent(&model, &new, &sequence);
                within(&what, rig.check(&sequence, &expected)).await;
                let staged = sequence.info().staged;
                assert!(
                    staged.is_empty() || staged.iter().all(|s| [7, 13].contains(s)),
                    "{what}: {staged:?}"
                );
                sequence.truncate(expected.len()).await.unwrap();
                let mut expected = expected;
                rig.append(&sequence, &mut expected, 2).await;
                rig.check(&sequence, &expected).await;
                drop((sequence, other));
                eventually(format!("{what}: closing"), || rig.cache.stats().sequences_open == 0).await;
            }
        }
    }
    rig.finish().await;
}

#[tokio::test]
async fn on_a_cpu_device() {
    whole_case("cancelling", run(0, 16)).await;
}

#[tokio::test]
async fn with_few_permits() {
    whole_case("cancelling", run(0, 5)).await;
}

#[tokio::test]
async fn with_copy_lanes() {
    whole_case("cancelling", run(3, 6)).await;
}

#[tokio::test]
async fn in_deterministic_mode() {
    whole_case("cancelling", run(2, 6)).await;
}

#[tokio::test]
async fn over_three_shards() {
    whole_case("cancelling", run(1, 6)).await;
}

/// Tasks that open with the same prompts, go on and are aborted at any time: no pin and no reference stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn tasks_that_share_and_are_aborted() {
    let rig = Arc::new(rig(1, |b| b.max_in_flight(6, 1 << 14)).await);
    let texts: Arc<Vec<_>> = Arc::new((0..4).map(|_| rig.text(43)).collect());
    let tasks: Vec<_> = (0..48usize)
        .map(|task| {
            let (rig, texts) = (rig.clone(), texts.clone());
            tokio::spawn(async move {
                for round in 0..8 {
                    let (sequence, model) = rig.shared(&texts[(task + round) % texts.len()]).await;
                    rig.check(&sequence, &model).await;
                    if round % 4 == 3 {
                        rig.cache.invalidate(Invalidate::All).await.unwrap();
                    }
                }
            })
        })
        .collect();
    for (at, task) in tasks.iter().enumerate() {
        for _ in 0..2 * at {
            tokio::task::yield_now().await;
        }
        if at % 3 > 0 {
            task.abort();
        }
    }
    for task in tasks {
        if let Err(error) = within("a task", task).await {
            assert!(error.is_cancelled(), "{error}");
        }
    }
    within("finishing", Arc::into_inner(rig).unwrap().finish()).await;
}

/// Tasks that are aborted at any time, among others that are not.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn tasks_that_are_aborted() {
    let rig = Arc::new(rig(1, |b| b.max_in_flight(6, 1 << 14)).await);
    let mut aborted = Vec::new();
    let mut others = Vec::new();
    for task in 0..48u32 {
        let rig = rig.clone();
        let work = tokio::spawn(async move {
            let (sequence, mut model) = rig.filled(1 + task % 7).await;
            for step in 0..6 {
                rig.append(&sequence, &mut model, 1 + (task + step) % 4).await;
                let fork = sequence.fork().await.unwrap();
                rig.check(&fork, &model).await;
            }
            rig.check(&sequence, &model).await;
        });
        if task % 3 == 0 { others.push(work) } else { aborted.push(work) }
    }
    for (at, task) in aborted.iter().enumerate() {
        for _ in 0..at {
            tokio::task::yield_now().await;
        }
        task.abort();
    }
    for task in others {
        within("a task that is left alone", task).await.unwrap();
    }
    for task in aborted {
        if let Err(error) = within("an aborted task", task).await {
            assert!(error.is_cancelled(), "{error}");
        }
    }
    within("finishing", Arc::into_inner(rig).unwrap().finish()).await;
}
