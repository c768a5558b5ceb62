//! A process that allocates and frees all the time, and verifies each page before it frees it.
//!
//! It runs during all other work of the guest, so that memory returned by the host is soon in use.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::ftruncate;

use crate::load::memory_file;
use crate::memory::NAMED_PAGES;
use crate::pattern::{self, PAGE_BYTES};
use crate::pressure::OOM_SCORE_FIRST;

/// First argument of the process.
pub(crate) const CHILD_ARGUMENT: &str = "churn-child";

/// Number of its files.
const FILES: usize = 16;

/// Maximum pages per write and read.
const CHUNK_PAGES: usize = 256;

/// Between two files. Without it, the process would use half of the guest's CPU time.
const PAUSE: Duration = Duration::from_millis(10);

/// Prefixes of its output lines.
const CHECKED: &str = "checked ";
const WRONG: &str = "wrong ";

static CHURN: Mutex<Option<Churn>> = Mutex::new(None);

/// The process, and the thread that reads its output.
struct Churn {
    child: Child,
    listener: JoinHandle<Results>,
}

/// Results of the process.
#[derive(Default)]
struct Results {
    pages: u64,
    wrong: u64,
    named: Vec<String>,
}

impl Results {
    fn add(&mut self, line: &str) {
        if let Some(pages) = line.strip_prefix(CHECKED) {
            self.pages += pages.parse::<u64>().unwrap_or(0);
        } else if let Some(page) = line.strip_prefix(WRONG) {
            self.wrong += 1;
            if self.wrong <= NAMED_PAGES {
                self.named.push(page.to_owned());
            }
        }
    }
}

/// Starts the process, which uses up to `mib` MiB.
pub(crate) fn start(mib: u64, seed: u64) -> Result<String, String> {
    let mut churn = CHURN.lock().map_err(|error| error.to_string())?;
    if churn.is_some() {
        return Err("it runs already".to_owned());
    }
    let mut child = Command::new("/proc/self/exe")
        .args([CHILD_ARGUMENT, &mib.to_string(), &seed.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start the process: {error}"))?;
    let stdout = child.stdout.take().ok_or("its output is not there")?;
    let listener = std::thread::spawn(move || {
        let mut results = Results::default();
        BufReader::new(stdout).lines().map_while(Result::ok).for_each(|line| results.add(&line));
        results
    });
    *churn = Some(Churn { child, listener });
    Ok(String::new())
}

/// Ends the process. Prints wrong pages, and returns the numbers of verified and wrong pages.
pub(crate) fn stop(emit: &mut dyn FnMut(&str) -> Result<(), String>) -> Result<String, String> {
    let churn = CHURN.lock().map_err(|error| error.to_string())?.take();
    let Churn { mut child, listener } = churn.ok_or("it does not run")?;
    let ended = child.try_wait().map_err(|error| error.to_string())?;
    child.kill().map_err(|error| error.to_string())?;
    child.wait().map_err(|error| error.to_string())?;
    let results = listener.join().map_err(|_| "the listener failed".to_owned())?;
    results.named.iter().try_for_each(|page| emit(page))?;
    match ended {
        None => Ok(format!("pages={} wrong={}", results.pages, results.wrong)),
        Some(status) => Err(format!("the process ended early: {status}")),
    }
}

/// Main function of the process.
pub(crate) fn child(arguments: &[String]) -> ExitCode {
    let number = |index: usize| arguments.get(index).and_then(|word| word.parse().ok());
    let (Some(mib), Some(seed)) = (number(2), number(3)) else {
        return ExitCode::FAILURE;
    };
    match churn(mib, seed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("init: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A file and its contents.
struct Held {
    file: File,
    pages: usize,
    seed: u64,
}

fn churn(mib: u64, seed: u64) -> Result<(), String> {
    let failed = |error: std::io::Error| error.to_string();
    fs::write("/proc/self/oom_score_adj", OOM_SCORE_FIRST).map_err(failed)?;
    let held = (0..FILES).map(|_| Ok(Held { file: memory_file()?, pages: 0, seed: 0 }));
    let mut held = held.collect::<Result<Vec<Held>, String>>()?;
    let most = (mib << 20) / (FILES * PAGE_BYTES) as u64;
    let mut random = seed | 1;
    loop {
        // xorshift: any sequence with a long period will do.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let file = held.get_mut(random as usize % FILES).ok_or("no file")?;
        file.verify().map_err(failed)?;
        file.pages = ((random >> 8) % (most + 1)) as usize;
        file.seed = random;
        file.write().map_err(failed)?;
        std::thread::sleep(PAUSE);
    }
}

impl Held {
    /// Number of pages and of the first page of each chunk.
    fn chunks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let pages = self.pages;
        (0..pages).step_by(CHUNK_PAGES).map(move |first| (first, CHUNK_PAGES.min(pages - first)))
    }

    /// Verifies the file, prints the results, and frees it.
    fn verify(&mut self) -> std::io::Result<()> {
        let mut output = std::io::stdout().lock();
        let mut found = vec![0; CHUNK_PAGES * PAGE_BYTES];
        let mut wanted = vec![0; CHUNK_PAGES * PAGE_BYTES];
        self.file.rewind()?;
        for (first, pages) in self.chunks() {
            let found = &mut found[..pages * PAGE_BYTES];
            self.file.read_exact(found)?;
            for page in pattern::wrong_pages(found, &mut wanted, self.seed, first as u64) {
                writeln!(output, "{WRONG}{page}")?;
            }
        }
        writeln!(output, "{CHECKED}{}", self.pages)?;
        output.flush()?;
        ftruncate(&self.file, 0)?;
        Ok(())
    }

    fn write(&mut self) -> std::io::Result<()> {
        let mut buffer = vec![0; CHUNK_PAGES * PAGE_BYTES];
        self.file.rewind()?;
        for (first, pages) in self.chunks() {
            let buffer = &mut buffer[..pages * PAGE_BYTES];
            pattern::generate(buffer, self.seed, first as u64);
            self.file.write_all(buffer)?;
        }
        Ok(())
    }
}
