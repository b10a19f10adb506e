//! The page, in a real browser without a window: it shows live figures, no script fails, and it is not blank. Skipped where there
//! is no Chromium. The screenshots stay in `target/.../serve-page`, for people to look at.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use super::{DEADLINE, start};
use crate::client::Client;
use crate::load::{Load, run};
use crate::toy::Toy;

/// A browser that takes screenshots by itself.
fn chromium() -> Option<PathBuf> {
    let names = ["chromium", "chromium-browser", "google-chrome", "chrome"];
    let folders = std::env::var_os("PATH")?;
    let paths = std::env::split_paths(&folders).flat_map(|folder| names.map(|name| folder.join(name)));
    paths.into_iter().find(|path| path.is_file())
}

/// Opens a page for a few seconds of its own time.
fn browse(browser: &Path, profile: &Path, flags: &[&str], url: &str) -> anyhow::Result<Output> {
    let output = Command::new(browser)
        // No sandbox: as root, and in containers, there is none to be had, and the page is our own.
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"])
        .args(["--no-first-run", "--disable-extensions", "--virtual-time-budget=4000"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .args(flags)
        .arg(url)
        .output()
        .with_context(|| format!("cannot start {}", browser.display()))?;
    ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(output)
}

/// Pixels of a picture that have one of these colours, and all pixels.
fn count(path: &Path, colours: &[[u8; 3]]) -> anyhow::Result<(Vec<usize>, usize)> {
    let file = std::io::BufReader::new(std::fs::File::open(path)?);
    let mut reader = png::Decoder::new(file).read_info()?;
    let mut pixels = vec![0; reader.output_buffer_size().context("a picture too large")?];
    let frame = reader.next_frame(&mut pixels)?;
    let channels = frame.color_type.samples();
    ensure!(channels >= 3 && frame.bit_depth == png::BitDepth::Eight, "{frame:?}");
    let pixels = || pixels[..frame.buffer_size()].chunks_exact(channels);
    let count = |colour: &[u8; 3]| pixels().filter(|pixel| pixel.starts_with(colour)).count();
    Ok((colours.iter().map(count).collect(), pixels().len()))
}

/// Bursts of clients, until somebody has seen enough.
async fn make_load(client: Client, enough: Arc<AtomicBool>) -> anyhow::Result<()> {
    for clients in [4, 24, 12, 40, 8].into_iter().cycle() {
        let load = Load { clients, rounds: 2, max_tokens: 120, leaves_every: 7, model: "toy".into() };
        run(&client, &load).await?;
        if enough.load(Ordering::Relaxed) {
            break;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_shows_live_figures_in_a_browser() {
    let Some(browser) = chromium() else {
        println!("skipped: there is no Chromium on the PATH");
        return;
    };
    let change = |settings: &mut crate::server::Settings| {
        // Too little for all, so that there is something to see.
        settings.memory_bytes_per_device = 256 << 10;
        settings.devices = kv_cache::Devices::cpu(2);
        settings.sample_every = Duration::from_millis(100);
    };
    let server = start(Toy::default(), change).await;
    let enough = Arc::new(AtomicBool::new(false));
    let load = tokio::spawn(make_load(server.client.clone(), enough.clone()));
    let mut status = Value::Null;
    while status["samples"].as_array().map_or(0, Vec::len) < 10 {
        status = server.get("/status").await.json().unwrap();
    }
    let generated = status["tokens_generated"].as_u64().unwrap();

    // The build's folder is above that of this program.
    let program = std::env::current_exe().unwrap();
    let folder = program.ancestors().nth(2).unwrap().join("serve-page");
    std::fs::create_dir_all(&folder).unwrap();
    let url = format!("http://{}/", server.server.addr);
    let browsed = tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
        let profile = folder.join("profile");
        let dom = browse(&browser, &profile, &["--dump-dom"], &url)?;
        check_dom(&String::from_utf8(dom.stdout)?, generated)?;
        // Blue and orange of the plots, and the page behind them.
        let light = [[0x2a, 0x78, 0xd6], [0xd9, 0x60, 0x1f], [0xf5, 0xf5, 0xf2]];
        let dark = [[0x5a, 0xa2, 0xf2], [0xf0, 0x8a, 0x52], [0x14, 0x14, 0x13]];
        let scheme = |dark: bool| {
            if dark {
                "--blink-settings=preferredColorScheme=0"
            } else {
                "--blink-settings=preferredColorScheme=1"
            }
        };
        for (name, size, is_dark) in
            [("light", "1280,1420", false), ("dark", "1280,1420", true), ("phone", "500,2900", false)]
        {
            let picture = folder.join(format!("{name}.png"));
            let screenshot = format!("--screenshot={}", picture.display());
            browse(
                &browser,
                &profile,
                &[&screenshot, &format!("--window-size={size}"), scheme(is_dark)],
                &url,
            )?;
            let (counts, all) = count(&picture, if is_dark { &dark } else { &light })?;
            println!("{}: {counts:?} of {all} pixels", picture.display());
            ensure!(counts[0] > 200 && counts[1] > 200, "{name}: the plots are missing: {counts:?}");
            ensure!(
                counts[2] > all / 50 && counts[2] < all / 2,
                "{name}: the page is blank: {counts:?} of {all}"
            );
        }
        Ok(())
    });
    let browsed = browsed.await.unwrap();
    enough.store(true, Ordering::Relaxed);
    tokio::time::timeout(DEADLINE, load).await.unwrap().unwrap().unwrap();
    browsed.unwrap();
    server.end().await;
}

/// What the scripts have made of the page.
fn check_dom(page: &str, generated: u64) -> anyhow::Result<()> {
    // Without the scripts themselves, which name what they make.
    let dom = page.split("<script>").next().unwrap_or_default();
    let attribute = |name: &str| {
        let rest = dom.split(&format!("data-{name}=\"")).nth(1)?;
        rest.split('"').next()?.parse::<u64>().ok()
    };
    ensure!(attribute("samples").is_some_and(|samples| samples >= 5), "no samples: {dom}");
    ensure!(attribute("generated").is_some_and(|shown| shown >= generated), "not live: {dom}");
    ensure!(dom.contains("<div id=\"script-errors\" role=\"alert\"></div>"), "a script has failed: {dom}");
    ensure!(dom.contains(">healthy</span>"), "it is healthy: {dom}");
    ensure!(dom.matches("class=\"line\"").count() >= 8, "lines are missing: {dom}");
    ensure!(dom.matches("class=\"shard\"").count() == 2, "two shards: {dom}");
    ensure!(!dom.contains("NaN") && !dom.contains(">undefined"), "a figure is none: {dom}");
    Ok(())
}
