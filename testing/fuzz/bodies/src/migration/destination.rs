//! A destination whose source is hostile.

use std::io;
use std::time::{Duration, Instant};

use migration::link::Accept;
use migration::observer::Silent;
use migration::raw::{FrameWriter, content_sum};
use migration::{
    DestinationConfig, DestinationGuest, DestinationOwnership, MigrationId, ReceiveFailure,
    Resolution, receive,
};

use super::machine::{Destination, MACHINE, MAX_BYTES};
use super::{Body, Scripted, kind};
use crate::script::Script;

const ID: MigrationId = MigrationId([3; 16]);

/// The frames of a hostile source, and what an honest one would send next.
struct HostileSource {
    writers: Vec<FrameWriter>,
    bytes: Vec<Vec<u8>>,
    round: u32,
    /// Chunks and pages of this round on each connection.
    named: Vec<(u64, u64)>,
    sections: u32,
    state_bytes: u64,
    commits: bool,
}

pub(super) fn run(script: &mut Script<'_>) {
    let mut source = HostileSource::new(script);
    while !script.is_over() {
        source.step(script);
    }
    let cannot_resume = source.bytes[0].len() % 7 == 3;
    let commits = source.commits;
    let links = source.bytes.into_iter().map(Scripted::bytes).rev().collect();
    let mut machine = Destination { cannot_resume, ..Destination::default() };
    let config =
        DestinationConfig { max_memory_bytes: MAX_BYTES, ..DestinationConfig::new(MACHINE) };
    let received = receive(&config, &mut machine, &mut Waiting(links), &mut Silent);
    match received {
        Ok(received) => {
            assert!(machine.runs && commits);
            assert_eq!(received.ownership.resolution(), Resolution::RunsAtDestination);
        }
        Err(ReceiveFailure { guest: DestinationGuest::InDoubt(ownership), .. }) => {
            assert!(machine.made && machine.loaded && !machine.runs);
            resolve(ownership, &mut machine, commits);
        }
        Err(_) => assert!(!machine.made && !machine.runs),
    }
}

/// The source resolves the doubt with a commit or a rollback.
fn resolve(mut ownership: DestinationOwnership, machine: &mut Destination, commits: bool) {
    let mut bytes = FrameWriter::new().frame(kind::HELLO, &hello(2, 0, 1, (1, 1)), &[]);
    let decision = if commits { kind::COMMIT } else { kind::ROLLBACK };
    bytes.extend(FrameWriter::keyed(ID, 0, true).frame(decision, &[], &[]));
    let _ = ownership.answer(Scripted::bytes(bytes), Duration::from_secs(1), machine);
    assert_eq!(machine.runs, ownership.resolution() == Resolution::RunsAtDestination);
    assert!(commits || ownership.resolution() == Resolution::NeverRan);
    assert!(machine.runs || !machine.made);
}

struct Waiting(Vec<Scripted>);

impl Accept for Waiting {
    type Link = Scripted;

    fn accept(&mut self, _deadline: Option<Instant>) -> io::Result<Scripted> {
        self.0.pop().ok_or_else(|| io::ErrorKind::ConnectionAborted.into())
    }
}

fn hello(purpose: u8, index: u8, count: u8, versions: (u16, u16)) -> Vec<u8> {
    let mut body = Body(b"AEROSTAT".to_vec()).u16(versions.0).u16(versions.1);
    body = body.u8(purpose).u8(index).u8(count).u8(0);
    body.0.extend(ID.0);
    body.u32(1).u32(0).0
}

impl HostileSource {
    fn new(script: &mut Script<'_>) -> Self {
        let count = script.pick([1, 1, 2, 3]);
        let mut source = Self {
            writers: Vec::new(),
            bytes: Vec::new(),
            round: 0,
            named: vec![(0, 0); count.into()],
            sections: 0,
            state_bytes: 0,
            commits: false,
        };
        for index in 0..count {
            let (purpose, versions, announced) = match script.u8() {
                1 => (script.u8(), (1, 1), count),
                2 => (1, (script.u16(), script.u16()), count),
                3 => (1, (1, 1), script.u8()),
                _ => (1, (1, 1), count),
            };
            let body = hello(purpose, index, announced, versions);
            source.bytes.push(FrameWriter::new().frame(kind::HELLO, &body, &[]));
            source.writers.push(FrameWriter::keyed(ID, index, true));
        }
        source
    }

    fn send(&mut self, on: usize, kind: u16, body: &[u8], payload: &[u8]) {
        self.commits |= kind == kind::COMMIT;
        let frame = self.writers[on].frame(kind, body, payload);
        self.bytes[on].extend(frame);
    }

    fn step(&mut self, script: &mut Script<'_>) {
        let step = script.u8();
        let on = usize::from(step >> 5) % self.writers.len();
        match step % 20 {
            0 => self.send(0, kind::DESCRIBE, &description(script), &[]),
            1 => self.round_start(script),
            2..=4 => self.chunk(script, on),
            5 => self.fill(script, on),
            6 => self.round_end(script, on),
            7 => (0..self.writers.len()).for_each(|on| self.round_end(&mut Script::new(&[]), on)),
            8 => self.round += 1,
            9 => self.state(script),
            10 => {
                let body = Body::default().u32(self.sections).u32(0).u64(self.state_bytes).0;
                self.send(0, kind::STATE_END, &body, &[]);
            }
            11 => self.send(0, kind::COMMIT, &[], &[]),
            12 => self.send(on, kind::ABORT, &Body::default().text(script.string()).0, &[]),
            13 => self.send(on, kind::ALIVE, &[], &[]),
            14 => {
                let (kind, body, payload) = (script.u16() % 24, script.string(), script.string());
                self.send(on, kind, body, payload);
            }
            15 => self.bytes[on].extend(script.string()),
            // Changes one byte of the last frame.
            16 => {
                let (back, value) = (usize::from(script.u8()) + 1, script.u8());
                let len = self.bytes[on].len();
                if let Some(byte) = self.bytes[on].get_mut(len.saturating_sub(back)) {
                    *byte = value;
                }
            }
            _ => self.honest(),
        }
    }

    /// All of a small guest, up to the commit.
    fn honest(&mut self) {
        let mut empty = Script::new(&[]);
        self.send(0, kind::DESCRIBE, &description(&mut empty), &[]);
        let last = Body::default().u32(self.round).u32(1).u64(50).0;
        self.send(0, kind::ROUND_START, &last, &[]);
        self.chunk(&mut empty, 0);
        (0..self.writers.len()).for_each(|on| self.round_end(&mut Script::new(&[]), on));
        self.state(&mut empty);
        let body = Body::default().u32(self.sections).u32(0).u64(self.state_bytes).0;
        self.send(0, kind::STATE_END, &body, &[]);
    }

    fn round_start(&mut self, script: &mut Script<'_>) {
        self.named.fill((0, 0));
        let round = self.round.wrapping_add(script.pick([0, 0, 0, 1]));
        let last = script.pick([0, 0, 1, 2]);
        let pages = script.pick([100, 10, 0, u64::MAX]);
        self.send(0, kind::ROUND_START, &Body::default().u32(round).u32(last).u64(pages).0, &[]);
    }

    fn chunk(&mut self, script: &mut Script<'_>, on: usize) {
        let start = script.pick([0, 64, 100, 90, u64::MAX, 1 << 52]);
        let data = script.pick([1, 0b101, 0, 0xff, 1 << 63]);
        let zeros = script.pick([0, 2, 0xff00, 1, u64::MAX]);
        let value = script.u8();
        let count = u64::from(u64::count_ones(data)) * 4096;
        let contents = vec![value; usize::try_from(count).unwrap_or(0)];
        let compression = script.pick([0, 0, 1, 2]);
        let mut payload = contents.clone();
        if compression == 1 {
            payload = zstd::bulk::compress(&contents, 1).expect("zstd works");
        }
        let round = u64::from(self.round);
        let mut sum = content_sum(&contents, [round, start, data, zeros]);
        match script.u8() {
            1 => sum ^= 1,
            2 => payload.truncate(script.u16().into()),
            3 => payload = script.string().to_vec(),
            _ => {}
        }
        let body = Body::default().u32(self.round).u32(compression).u64(start).u64(data);
        self.named[on].0 += 1;
        self.named[on].1 += u64::from((data | zeros).count_ones());
        self.send(on, kind::CHUNK, &body.u64(zeros).u64(sum).0, &payload);
    }

    fn fill(&mut self, script: &mut Script<'_>, on: usize) {
        let count = script.pick([1, 2, 0, 255]);
        let pattern = script.pick([0xaaaa_aaaa, 0, 1]);
        let mut body = Body::default().u32(self.round).u32(pattern).u32(count).u32(0);
        for _ in 0..count.min(3) {
            let pages = script.pick([1, 16, 0, u64::MAX]);
            body = body.u64(script.u64_up_to(130)).u64(pages);
        }
        self.send(on, kind::FILL, &body.0, &[]);
    }

    fn round_end(&mut self, script: &mut Script<'_>, on: usize) {
        let (chunks, pages) = self.named[on];
        let chunks = chunks + u64::from(script.flag());
        let body = Body::default().u32(self.round).u32(0).u64(chunks).u64(pages);
        self.send(on, kind::ROUND_END, &body.0, &[]);
    }

    fn state(&mut self, script: &mut Script<'_>) {
        let bytes = script.string();
        let total = match script.u8() {
            1 => script.u64(),
            2 => bytes.len() as u64 + 5,
            _ => bytes.len() as u64,
        };
        let offset = script.pick([0, 0, 0, 5]);
        let index = self.sections.wrapping_add(script.pick([0, 0, 1, u32::MAX]));
        let sum = content_sum(bytes, [index.into(), 1, total, offset]);
        let body = Body::default().u32(index).u32(1).u64(total).u64(offset).u64(sum);
        self.sections = self.sections.wrapping_add(1);
        self.state_bytes = self.state_bytes.wrapping_add(total);
        self.send(0, kind::STATE, &body.text(b"part").0, bytes);
    }
}

fn description(script: &mut Script<'_>) -> Vec<u8> {
    let machine: &[u8] = if script.u8() == 1 { script.string() } else { MACHINE.as_bytes() };
    let mut body = Body::default().text(machine);
    body = match script.u8() {
        1 => body.u32(script.u16().into()).u64(script.u64()).u64(script.u64()),
        2 => body.u32(1).u64(0).u64(1 << 40),
        _ => body.u32(2).u64(0).u64(70).u64(100).u64(30),
    };
    body = body.text(b"v").u32(1).u64(1).u64(script.pick([1, 0, 0x1ff]));
    let config = script.string();
    let mut body = body.text(config);
    body.0.extend(script.pick([&[][..], &[], &[0]]));
    body.0
}
