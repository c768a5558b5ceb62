//! The line protocol with the guest's init, and the record of everything the guest prints.
//!
//! The host writes `ID COMMAND ARGUMENT...`. The guest answers with `@lab ID | TEXT` lines and
//! one `@lab ID ok TEXT` or `@lab ID err TEXT`. All else on the console is kernel messages.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::error::{Context, LabError, Result};

/// Begins every answer of the guest.
const MARKER: &str = "@lab ";

/// The number under which the guest says that it is ready.
const GUEST_ID: u64 = 0;

/// Lines kept in memory; a longer record needs a log file.
const KEPT_LINES: usize = 20_000;

/// Lines of the record that go into an error.
const TAIL_LINES: usize = 30;

/// The answer to a command that the guest could do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reply {
    /// What the command printed, line by line.
    pub lines: Vec<String>,
    /// Its result in a word: a number of pages, of MiB, or nothing.
    pub text: String,
}

/// Until the output of a process that has ended is read to its end.
const END_OF_OUTPUT: Duration = Duration::from_secs(10);

/// A piece of an answer.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Line(String),
    Done(String),
    Refused(String),
}

/// Finds an answer in a line, which may begin with a piece of a kernel message.
fn parse(line: &str) -> Option<(u64, Answer)> {
    let rest = &line[line.find(MARKER)? + MARKER.len()..];
    let (id, rest) = rest.split_once(' ')?;
    let (verdict, text) = rest.split_once(' ').unwrap_or((rest, ""));
    let text = text.to_owned();
    let answer = match verdict {
        "|" => Answer::Line(text),
        "ok" => Answer::Done(text),
        "err" => Answer::Refused(text),
        _ => return None,
    };
    Some((id.parse().ok()?, answer))
}

/// Everything the guest printed, shared by the threads that read it.
#[derive(Clone)]
pub(crate) struct Record(Arc<Mutex<RecordState>>);

struct RecordState {
    lines: VecDeque<String>,
    started: Instant,
    file: Option<File>,
}

impl Record {
    /// An empty record that is also written to a file, if one is given.
    pub(crate) fn new(path: Option<&Path>) -> Result<Self> {
        let file = path.map(|path| File::create(path).context_path("write the log", path));
        let file = file.transpose()?;
        let state = RecordState { lines: VecDeque::new(), started: Instant::now(), file };
        Ok(Self(Arc::new(Mutex::new(state))))
    }

    /// Adds a line with the time since the boot began.
    pub(crate) fn push(&self, source: &str, line: &str) {
        let mut state = self.state();
        let seconds = state.started.elapsed().as_secs_f64();
        let line = format!("[{seconds:9.3}] {source} {line}");
        if let Some(file) = &mut state.file {
            // A full disk must not end the guest; the record in memory goes on.
            let _ = writeln!(file, "{line}");
        }
        if state.lines.len() == KEPT_LINES {
            state.lines.pop_front();
        }
        state.lines.push_back(line);
    }

    /// The last `count` lines.
    pub(crate) fn tail(&self, count: usize) -> String {
        let state = self.state();
        let skipped = state.lines.len().saturating_sub(count);
        let lines: Vec<&str> = state.lines.iter().skip(skipped).map(String::as_str).collect();
        lines.join("\n")
    }

    fn state(&self) -> MutexGuard<'_, RecordState> {
        // A thread that panicked while it pushed a line has done no harm to the others.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Records the lines of a stream in a thread of its own, until the stream ends.
    ///
    /// `each` gets every line, and whether it is whole: the last one may not be. What it holds is
    /// dropped at the end of the stream.
    pub(crate) fn follow(
        &self,
        source: &'static str,
        stream: impl Read + Send + 'static,
        mut each: impl FnMut(&str, bool) + Send + 'static,
    ) {
        let record = self.clone();
        std::thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut bytes = Vec::new();
            while matches!(stream.read_until(b'\n', &mut bytes), Ok(1..)) {
                let line = String::from_utf8_lossy(&bytes);
                let whole = line.ends_with('\n');
                let line = line.trim_end_matches(['\r', '\n']);
                record.push(source, line);
                each(line, whole);
                bytes.clear();
            }
        });
    }
}

/// A line that the guest printed with an answer in it, or the first half of any line.
struct Line {
    text: String,
    whole: bool,
}

/// The host's end of the protocol.
pub(crate) struct Console {
    input: Box<dyn Write + Send>,
    lines: Receiver<Line>,
    record: Record,
    last_id: u64,
    /// The beginning of a line, where the guest went elsewhere in the middle of it.
    half: String,
    /// What was printed of an answer whose end was not.
    unfinished: Option<(u64, Vec<String>)>,
    /// Answers that came while nobody, or somebody else, waited for them.
    early: VecDeque<(u64, Answer)>,
}

/// Why a command got no answer that ends it.
enum Silence {
    Timeout,
    Closed,
}

impl Console {
    /// Talks over the two streams; `output` is read to its end by a thread.
    pub(crate) fn new(
        input: impl Write + Send + 'static,
        output: impl Read + Send + 'static,
        record: Record,
    ) -> Self {
        let (sender, lines): (Sender<Line>, _) = channel();
        let mut first = true;
        record.follow("console", output, move |text, whole| {
            // The first one may be the other half of an answer that began elsewhere.
            if first || !whole || text.contains(MARKER) {
                // Nobody listens any more when the guest is being ended.
                let _ = sender.send(Line { text: text.to_owned(), whole });
            }
            first = false;
        });
        let (half, unfinished, early) = (String::new(), None, VecDeque::new());
        Self { input: Box::new(input), lines, record, last_id: GUEST_ID, half, unfinished, early }
    }

    /// Goes on with a guest that was moved here, where `from` has ended: with its numbers, and with
    /// what it printed there last.
    pub(crate) fn continue_from(&mut self, from: &mut Self) {
        let deadline = Instant::now() + END_OF_OUTPUT;
        let mut early = VecDeque::new();
        while let Ok(answer) = from.next_answer(deadline) {
            early.push_back(answer);
        }
        self.last_id = from.last_id;
        self.half = std::mem::take(&mut from.half);
        self.unfinished = from.unfinished.take();
        self.early = early;
        // Ends a command of which half was typed there. What cannot be typed is told by the next.
        let _ = self.press_return();
    }

    /// Types the end of a line, which is no command.
    pub(crate) fn press_return(&mut self) -> std::io::Result<()> {
        self.input.write_all(b"\n").and_then(|()| self.input.flush())
    }

    /// Waits until the guest says that it is ready.
    pub(crate) fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        self.wait(GUEST_ID, "boot", limit).map(drop)
    }

    /// Sends a command and waits for the end of its answer.
    pub(crate) fn run(&mut self, command: &str, limit: Duration) -> Result<Reply> {
        self.run_telling(command, limit, &mut |_| {})
    }

    /// The same; `tell` hears each line of the answer as it comes.
    pub(crate) fn run_telling(
        &mut self,
        command: &str,
        limit: Duration,
        tell: &mut dyn FnMut(&str),
    ) -> Result<Reply> {
        let id = self.send(command)?;
        self.wait_telling(id, command, limit, tell)
    }

    /// Sends a command; returns its number.
    pub(crate) fn send(&mut self, command: &str) -> Result<u64> {
        self.last_id += 1;
        let id = self.last_id;
        let line = command.replace('\n', " ");
        self.record.push("host", &format!("{id} {line}"));
        let sent = self.input.write_all(format!("{id} {line}\n").as_bytes());
        if sent.and_then(|()| self.input.flush()).is_err() {
            return Err(self.no_answer(command, Duration::ZERO, &Silence::Closed));
        }
        Ok(id)
    }

    /// Waits for the end of the answer to the command with this number.
    pub(crate) fn wait(&mut self, wanted: u64, command: &str, limit: Duration) -> Result<Reply> {
        self.wait_telling(wanted, command, limit, &mut |_| {})
    }

    /// The same; `tell` hears each line of the answer as it comes.
    fn wait_telling(
        &mut self,
        wanted: u64,
        command: &str,
        limit: Duration,
        tell: &mut dyn FnMut(&str),
    ) -> Result<Reply> {
        let deadline = Instant::now() + limit;
        let begun = self.unfinished.take().filter(|(id, _)| *id == wanted);
        let mut reply = Reply { lines: begun.unwrap_or_default().1, ..Reply::default() };
        loop {
            let (id, answer) = match self.next_answer(deadline) {
                Ok(answer) => answer,
                Err(silence) => {
                    self.unfinished = Some((wanted, reply.lines));
                    return Err(self.no_answer(command, limit, &silence));
                }
            };
            if id > wanted {
                // The guest answers in turn.
                self.early.push_front((id, answer));
                return Err(LabError::NotHeard { command: command.to_owned() });
            }
            // Answers to a command that was given up on come late; they are in the record.
            if id < wanted {
                continue;
            }
            match answer {
                Answer::Line(line) => {
                    tell(&line);
                    reply.lines.push(line);
                }
                Answer::Done(text) => return Ok(Reply { text, ..reply }),
                Answer::Refused(reason) => {
                    return Err(LabError::Refused { command: command.to_owned(), reason });
                }
            }
        }
    }

    fn next_answer(&mut self, deadline: Instant) -> Result<(u64, Answer), Silence> {
        if let Some(answer) = self.early.pop_front() {
            return Ok(answer);
        }
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).map_err(|error| match error {
                RecvTimeoutError::Timeout => Silence::Timeout,
                RecvTimeoutError::Disconnected => Silence::Closed,
            })?;
            self.half.push_str(&line.text);
            if line.whole
                && let Some(answer) = parse(&std::mem::take(&mut self.half))
            {
                return Ok(answer);
            }
        }
    }

    fn no_answer(&self, command: &str, limit: Duration, silence: &Silence) -> LabError {
        let (command, tail) = (command.to_owned(), self.record.tail(TAIL_LINES));
        match silence {
            Silence::Timeout => LabError::Timeout { command, limit, tail },
            Silence::Closed => {
                LabError::Ended { command, status: "its console is closed".to_owned(), tail }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn answers_are_found_in_lines() {
        let done = |text: &str| Answer::Done(text.to_owned());
        assert_eq!(parse("@lab 7 ok 3400"), Some((7, done("3400"))));
        assert_eq!(parse("@lab 7 ok"), Some((7, done(""))));
        assert_eq!(parse("[ 1.0] half a line@lab 8 ok a b"), Some((8, done("a b"))));
        assert_eq!(
            parse("@lab 1 | MemFree: 1 kB"),
            Some((1, Answer::Line("MemFree: 1 kB".into())))
        );
        assert_eq!(parse("@lab 2 err no: ok"), Some((2, Answer::Refused("no: ok".into()))));
        for noise in ["", "ok", "@lab", "@lab x ok", "@lab 1 maybe", "random: crng init done"] {
            assert_eq!(parse(noise), None, "{noise}");
        }
    }

    /// A guest that answers the first command with these bytes and keeps the console open.
    fn scripted(answer: &'static [u8]) -> (Console, UnixStream) {
        let (host, mut guest) = UnixStream::pair().unwrap();
        guest.write_all(answer).unwrap();
        let record = Record::new(None).unwrap();
        (Console::new(host.try_clone().unwrap(), host, record), guest)
    }

    #[test]
    fn kernel_messages_and_late_answers_are_passed_over() {
        let (mut console, _guest) = scripted(
            b"@lab 0 ok ready\r\n[ 2.0] noise\n@lab 0 ok late\n@lab 1 | one\n[ 3.0] x@lab 1 ok two\n",
        );
        console.wait_ready(LIMIT).unwrap();
        let reply = console.run("anything", LIMIT).unwrap();
        assert_eq!(reply, Reply { lines: vec!["one".into()], text: "two".into() });
    }

    #[test]
    fn silence_is_a_timeout_that_shows_the_console() {
        let (mut console, _guest) = scripted(b"Kernel panic - not syncing\n@lab 0 ok late\n");
        let error = loop {
            // The reading thread may not have seen the message at the first attempt.
            let error = console.run("touch 1", Duration::from_millis(50)).unwrap_err();
            if error.to_string().contains("panic") || !matches!(error, LabError::Timeout { .. }) {
                break error;
            }
        };
        assert!(matches!(error, LabError::Timeout { .. }), "{error}");
        assert!(error.to_string().contains("touch 1"), "{error}");
    }

    #[test]
    fn the_end_of_the_guest_and_its_refusal_are_told_apart() {
        let (mut console, guest) = scripted(b"@lab 1 err no such module\n");
        let error = console.run("rmmod x", LIMIT).unwrap_err();
        assert!(matches!(error, LabError::Refused { .. }), "{error}");
        drop(guest);
        let error = console.run("sync", LIMIT).unwrap_err();
        assert!(matches!(error, LabError::Ended { .. }), "{error}");
    }

    #[test]
    fn a_conversation_goes_on_where_the_guest_goes_on() {
        for waits in [true, false] {
            conversation_goes_on(waits);
        }
    }

    /// Whether or not somebody was waiting when the first process ended.
    fn conversation_goes_on(waits: bool) {
        let (mut first, mut guest) = scripted(b"@lab 1 | one\n@lab 1 | tw");
        assert_eq!(first.send("anything").unwrap(), 1);
        // A socket that is closed with bytes unread loses what it said last.
        guest.read_exact(&mut [0; 11]).unwrap();
        drop(guest);
        if waits {
            let error = first.wait(1, "anything", LIMIT).unwrap_err();
            assert!(matches!(error, LabError::Ended { .. }), "{error}");
        }
        let (mut second, mut guest) = scripted(b"o\n@lab 1 ok three\n@lab 3 ok\n");
        second.continue_from(&mut first);
        let reply = second.wait(1, "anything", LIMIT).unwrap();
        let lines = vec!["one".into(), "two".into()];
        assert_eq!(reply, Reply { lines, text: "three".into() });
        // One that was lost on the way is not waited for.
        assert_eq!((second.send("lost").unwrap(), second.send("heard").unwrap()), (2, 3));
        let error = second.wait(2, "lost", LIMIT).unwrap_err();
        assert!(matches!(error, LabError::NotHeard { .. }), "{error}");
        assert_eq!(second.wait(3, "heard", LIMIT).unwrap(), Reply::default());
        let mut typed = [0; 16];
        guest.read_exact(&mut typed).unwrap();
        assert_eq!(&typed, b"\n2 lost\n3 heard\n");
    }

    #[test]
    fn the_record_keeps_the_last_lines_and_writes_all() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let record = Record::new(Some(file.path())).unwrap();
        for number in 0..=KEPT_LINES {
            record.push("test", &format!("line {number}."));
        }
        assert!(!record.tail(usize::MAX).contains("line 0."));
        assert!(record.tail(1).ends_with(&format!("line {KEPT_LINES}.")));
        assert!(std::fs::read_to_string(file.path()).unwrap().contains("line 0."));
    }
}
