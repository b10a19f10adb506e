//! Starts a server out of a model and settings, and ends it in order.
//!
//! Start: cache, runner's thread, routes. End: no new requests, streams run to their end or to a deadline, the runner stops, connections
//! close, and last the cache, which nobody uses any more then.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use axum::serve::ListenerExt;
use kv_cache::{Cache, Devices, Format, ShutdownReport};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinHandle as Task;

use crate::app::{App, DELIVERING_MAX, unix_s};
use crate::figures::Figures;
use crate::history::History;
use crate::model::Model;
use crate::runner::{Mail, Runner, RunnerOptions};
use crate::scheduler::{Limits, Scheduler};
use crate::{http, prometheus};

/// Settings of a server.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) listen: SocketAddr,
    pub(crate) devices: Devices,
    pub(crate) memory_bytes_per_device: u64,
    /// None: what the model suggests.
    pub(crate) sealed_format: Option<Format>,
    /// A file of the model's mean keys.
    pub(crate) key_means: Option<PathBuf>,
    /// Requests that run at once, and that wait beside them. More are answered with 429.
    pub(crate) running_max: usize,
    pub(crate) waiting_max: usize,
    /// Tokens of one step: how long the next token of everybody else may wait for a prompt.
    pub(crate) step_tokens: u32,
    pub(crate) body_bytes_max: usize,
    pub(crate) body_within: Duration,
    /// A client that has not read for so long is given up.
    pub(crate) cut_after: Duration,
    /// Without a step for so long while there is work, the server calls itself ill.
    pub(crate) stalled_after: Duration,
    pub(crate) sample_every: Duration,
    /// Of the kernel, for each connection: what a client that never reads may hold.
    pub(crate) send_buffer_bytes: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            devices: Devices::Auto,
            memory_bytes_per_device: 1 << 30,
            sealed_format: None,
            key_means: None,
            running_max: 64,
            waiting_max: 256,
            step_tokens: 128,
            body_bytes_max: 1 << 20,
            body_within: Duration::from_secs(30),
            cut_after: Duration::from_secs(60),
            stalled_after: Duration::from_secs(30),
            sample_every: Duration::from_secs(1),
            send_buffer_bytes: 64 << 10,
        }
    }
}

/// A server that runs. Dropped without [`Server::shutdown`] it ends with its runtime.
pub(crate) struct Server {
    pub(crate) addr: SocketAddr,
    pub(crate) app: Arc<App>,
    runner: JoinHandle<()>,
    http: Task<std::io::Result<()>>,
    close_http: oneshot::Sender<()>,
    sampler: Task<()>,
}

/// How a server has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Every request got its answer before the deadline, and every connection took it.
    pub(crate) drained: bool,
    pub(crate) cache: ShutdownReport,
}

impl Server {
    /// Opens the cache and starts to serve.
    ///
    /// # Errors
    /// When the cache cannot be built, holds less than a block of the model, or the address cannot be had.
    pub(crate) async fn start(settings: Settings, model: Model) -> anyhow::Result<Server> {
        prometheus::install();
        let format = settings.sealed_format.unwrap_or(model.sealed_format);
        let cache = Cache::builder(model.geometry)
            .devices(settings.devices)
            .memory_bytes_per_device(settings.memory_bytes_per_device)
            .sealed_format(format)
            .configure(|config| config.quantisation.key_means = settings.key_means.clone())
            .build()
            .await?;
        let context_tokens = longest_sequence(&cache, model.context_tokens);
        ensure!(context_tokens > 1, "the cache holds no sequence at all: give it more memory");
        let listener = listen(&settings).with_context(|| format!("cannot listen on {}", settings.listen))?;
        let addr = listener.local_addr()?;

        let figures = Arc::new(Figures::new());
        let (mail, mailbox) = mpsc::channel();
        let limits = Limits {
            running_max: settings.running_max,
            step_tokens: settings.step_tokens,
            chunk_tokens: model.chunk_tokens,
        }
        .checked();
        let runner = Runner::new(
            cache.blocking(),
            model.codec.clone(),
            model.decoder,
            Scheduler::new(limits),
            mailbox,
            figures.clone(),
            RunnerOptions { cut_after: settings.cut_after },
        );
        let places_max = limits.running_max + settings.waiting_max;
        let app = Arc::new(App {
            model: model.name,
            codec: model.codec,
            context_tokens,
            cache,
            sealed_format: format,
            figures,
            history: History::default(),
            mail,
            places: Arc::new(Semaphore::new(places_max)),
            delivering: Arc::new(Semaphore::new(DELIVERING_MAX as usize)),
            places_max: u32::try_from(places_max)
                .context("so many requests may wait that none could be counted")?,
            running_max: limits.running_max,
            is_draining: AtomicBool::new(false),
            runner_ended: Arc::default(),
            body_bytes_max: settings.body_bytes_max,
            body_within: settings.body_within,
            stalled_after: settings.stalled_after,
            started: Instant::now(),
            created_s: unix_s(),
            next_id: AtomicU64::new(0),
        });
        let runner = run(runner, app.runner_ended.clone())?;
        let (close_http, closed) = oneshot::channel();
        let router = http::router(app.clone());
        let http = tokio::spawn(async move {
            // Each piece of a stream is small and awaited: it must not wait for more to come.
            let listener = listener.tap_io(|connection| {
                let _ = connection.set_nodelay(true);
            });
            let end = async move { drop(closed.await) };
            axum::serve(listener, router).with_graceful_shutdown(end).await
        });
        let sampler = tokio::spawn(sample(app.clone(), settings.sample_every));
        Ok(Server { addr, app, runner, http, close_http, sampler })
    }

    /// Ends it: requests that run have until `deadline` to end by themselves.
    ///
    /// # Errors
    /// When the runner's thread panicked.
    pub(crate) async fn shutdown(self, deadline: Duration) -> anyhow::Result<Ended> {
        self.app.is_draining.store(true, Ordering::Relaxed);
        let end = tokio::time::Instant::now() + deadline;
        let answered = async { (self.app.idle().await, self.app.delivered().await) };
        let drained = tokio::time::timeout_at(end, answered).await.is_ok();
        // It may have ended.
        let _ = self.app.mail.send(Mail::Stop);
        let runner = tokio::task::spawn_blocking(move || self.runner.join()).await?;
        let _ = self.close_http.send(());
        // Connections that have nothing under way close at once, and those of slow clients when the end of their answer is written; those
        // of clients that do not read never would.
        let mut http = self.http;
        let end = end.max(tokio::time::Instant::now() + Duration::from_secs(1));
        let written = tokio::time::timeout_at(end, &mut http).await.is_ok();
        if !written {
            http.abort();
        }
        self.sampler.abort();
        let cache = self.app.cache.shutdown(Duration::from_secs(5)).await;
        ensure!(runner.is_ok(), "the thread that runs the model has panicked");
        Ok(Ended { drained: drained && written, cache })
    }
}

fn run(runner: Runner, ended: Arc<AtomicBool>) -> std::io::Result<JoinHandle<()>> {
    /// Says so also when the thread panics.
    struct Says(Arc<AtomicBool>);
    impl Drop for Says {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    std::thread::Builder::new().name("serve-runner".into()).spawn(move || {
        let _says = Says(ended);
        runner.run();
    })
}

fn listen(settings: &Settings) -> std::io::Result<TcpListener> {
    let socket = if settings.listen.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    // Connections take it over from the listener.
    socket.set_send_buffer_size(settings.send_buffer_bytes)?;
    socket.bind(settings.listen)?;
    socket.listen(1024)
}

/// Most tokens, up to `most`, for which an empty cache has room.
fn longest_sequence(cache: &Cache, most: u32) -> u32 {
    let (mut fits, mut too_many) = (0, most.saturating_add(1));
    while too_many - fits > 1 {
        let middle = fits + (too_many - fits) / 2;
        *if cache.can_admit(middle) { &mut fits } else { &mut too_many } = middle;
    }
    fits
}

async fn sample(app: Arc<App>, every: Duration) {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        ticks.tick().await;
        app.history.sample(&app);
    }
}
