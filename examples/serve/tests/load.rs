//! Real load: 64 clients at once, a system prompt in common, some go away in the middle.

use super::{DEADLINE, start};
use crate::api::Role;
use crate::load::{Load, SYSTEM_PROMPT, run};
use crate::model::Codec;
use crate::toy::{Bytes, Toy, answer};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_clients_some_of_which_leave() {
    let server = start(Toy::default(), |settings| {
        settings.memory_bytes_per_device = 2 << 20;
        settings.running_max = 48;
    })
    .await;
    let load = Load { clients: 64, rounds: 3, max_tokens: 120, leaves_every: 5, model: "toy".into() };
    let (report, seen) = tokio::time::timeout(DEADLINE, run(&server.client, &load)).await.unwrap().unwrap();
    assert_eq!((report.answers, report.left), (64 * 3, 12 * 3));
    for chat in seen.iter().filter(|chat| !chat.left) {
        let messages = [(Role::System, SYSTEM_PROMPT.to_owned()), (Role::User, chat.question.clone())];
        let (text, _) = answer(&Bytes.encode_chat(&messages).unwrap(), 120, 0);
        assert_eq!((&chat.text, chat.completion_tokens), (&text, 120));
    }
    server.is_clean().await;
    let total = server.server.app.cache.stats().total;
    // In the second and third round everybody finds the system prompt.
    let blocks = SYSTEM_PROMPT.len() as u64 / 32;
    assert!(
        total.prefix_blocks_hit > 64 * 2 * blocks,
        "{} of {}",
        total.prefix_blocks_hit,
        total.prefix_blocks_asked
    );
    // An answer may be done by the time its client has left.
    let (finished, otherwise) = server.ended();
    assert!(finished >= 52 * 3 && finished + otherwise == 64 * 3, "{finished} and {otherwise}");
    server.end().await;
}
