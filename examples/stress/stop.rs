//! Ctrl-C: asked once, everybody ends what they are doing and the report is written; asked twice, the process ends.

use tokio::sync::watch;

/// Says when to stop.
#[derive(Debug, Clone)]
pub(crate) struct Stop(watch::Receiver<bool>);

impl Stop {
    /// Listens for Ctrl-C from now on.
    pub(crate) fn on_ctrl_c() -> Self {
        let (sender, receiver) = watch::channel(false);
        tokio::spawn(async move {
            if tokio::signal::ctrl_c().await.is_ok() {
                sender.send_replace(true);
                eprintln!("stopping; once more to end at once");
                let _ = tokio::signal::ctrl_c().await;
                std::process::exit(130);
            }
            // No signals here: the sender must live on, or everybody would believe that it is time to stop.
            std::future::pending::<()>().await;
        });
        Stop(receiver)
    }

    /// Whether it is time.
    pub(crate) fn is_requested(&self) -> bool {
        *self.0.borrow()
    }

    /// Ends when it is time.
    pub(crate) async fn requested(&self) {
        let _ = self.0.clone().wait_for(|stop| *stop).await;
    }
}
