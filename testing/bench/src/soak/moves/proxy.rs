//! A proxy between the two sides of a migration that injects one fault.
//!
//! It parses frames (docs/migration.md, "Bytes") and passes them on, up to the chosen one. It does
//! not touch later connections, so that an in-doubt migration can be resolved.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use migration::MigrationId;
use migration::raw::{FrameWriter, content_sum};

use crate::error::{Result, host};

/// Bytes of a frame header, and offsets of its kind and the lengths of body and payload.
const HEAD_BYTES: usize = 24;
const KIND: usize = 8;
const BODY: usize = 12;
const PAYLOAD: usize = 16;

/// Offsets of connection index and migration id in the body of a hello.
const HELLO_INDEX: usize = 13;
const HELLO_ID: usize = 16;

/// Kinds of frames.
const CHUNK: u16 = 6;
const ROUND_START: u16 = 5;
const STATE: u16 = 10;
const HELLO: u16 = 1;

/// Between two polls of a stalled connection.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Sender of a frame, or the side whose process is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The source.
    Source,
    /// The destination.
    Destination,
}

/// The stage of a fault: the first such frame, or a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The source's hello.
    Hello,
    /// The destination's hello.
    Welcome,
    /// The source describes the guest.
    Describe,
    /// The destination has allocated it.
    Ready,
    /// The first round begins.
    FirstRound,
    /// Pages of the first round.
    FirstPages,
    /// The first round ends.
    RoundDone,
    /// Pages of a later round.
    LaterPages,
    /// The guest is paused; the last round begins.
    LastRound,
    /// Pages of the last round.
    LastPages,
    /// Part of the state.
    State,
    /// End of the state.
    StateEnd,
    /// The destination is prepared to run the guest.
    Prepared,
    /// The source commits.
    Commit,
    /// The destination runs the guest.
    Running,
}

impl Stage {
    /// All stages in order.
    pub const ALL: [Self; 15] = [
        Self::Hello,
        Self::Welcome,
        Self::Describe,
        Self::Ready,
        Self::FirstRound,
        Self::FirstPages,
        Self::RoundDone,
        Self::LaterPages,
        Self::LastRound,
        Self::LastPages,
        Self::State,
        Self::StateEnd,
        Self::Prepared,
        Self::Commit,
        Self::Running,
    ];

    /// Whether more frames of this kind follow.
    pub(super) const fn is_repeated(self) -> bool {
        matches!(self, Self::FirstPages | Self::LaterPages | Self::LastPages | Self::State)
    }

    /// Whether the destination may have the guest without knowing whether the source runs it.
    pub const fn is_in_doubt(self) -> bool {
        matches!(self, Self::Prepared | Self::Commit | Self::Running)
    }

    /// Sender of the frame.
    pub const fn side(self) -> Side {
        match self {
            Self::Welcome | Self::Ready | Self::RoundDone | Self::Prepared | Self::Running => {
                Side::Destination
            }
            _ => Side::Source,
        }
    }

    fn is(self, frame: &Frame, last_round: u32) -> bool {
        let round = frame.word(0);
        let of_round = |kind| frame.kind == kind && round != last_round;
        match self {
            Self::Hello => frame.kind == HELLO,
            Self::Welcome => frame.kind == 2,
            Self::Describe => frame.kind == 3,
            Self::Ready => frame.kind == 4,
            Self::FirstRound => frame.kind == ROUND_START && round == 0,
            Self::FirstPages => frame.kind == CHUNK && round == 0,
            Self::RoundDone => frame.kind == 9,
            Self::LaterPages => of_round(CHUNK) && round > 0,
            Self::LastRound => frame.kind == ROUND_START && frame.word(4) != 0,
            Self::LastPages => frame.kind == CHUNK && round == last_round,
            Self::State => frame.kind == STATE,
            Self::StateEnd => frame.kind == 11,
            Self::Prepared => frame.kind == 12,
            Self::Commit => frame.kind == 13,
            Self::Running => frame.kind == 14,
        }
    }
}

/// The fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// All connections break before the frame.
    Cut,
    /// All connections break after it.
    CutBehind,
    /// All connections break in the middle of it.
    CutWithin,
    /// Nothing arrives any more in either direction, without an error.
    Stall,
    /// A bit of it is flipped.
    Corrupt,
    /// It arrives after the next one of its connection.
    Reorder,
    /// It arrives twice.
    Repeat,
    /// The sender is hostile: parts of it change, with correct checksums.
    Forge,
    /// The source's process is killed.
    KillSource,
    /// The destination's process is killed.
    KillDestination,
}

impl FaultKind {
    /// All faults.
    pub const ALL: [Self; 10] = [
        Self::Cut,
        Self::CutBehind,
        Self::CutWithin,
        Self::Stall,
        Self::Corrupt,
        Self::Reorder,
        Self::Repeat,
        Self::Forge,
        Self::KillSource,
        Self::KillDestination,
    ];

    /// Whether it has a visible effect at this stage. Forged pages are only pages of another guest,
    /// which an authenticated source may send.
    pub const fn fits(self, stage: Stage) -> bool {
        match self {
            Self::Reorder | Self::Repeat => stage.is_repeated(),
            Self::Forge => {
                let has_no_content = matches!(stage, Stage::Hello | Stage::Commit);
                !has_no_content && (!stage.is_repeated() || matches!(stage, Stage::State))
            }
            _ => true,
        }
    }

    /// Side whose process it kills.
    pub const fn kills(self) -> Option<Side> {
        match self {
            Self::KillSource => Some(Side::Source),
            Self::KillDestination => Some(Side::Destination),
            _ => None,
        }
    }
}

/// A fault to inject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Stage.
    pub stage: Stage,
    /// Number of such frames to skip.
    pub later: u32,
    /// Kind.
    pub kind: FaultKind,
    /// Seed of the changes.
    pub seed: u64,
}

/// Kills the process of a side.
pub type Kill = Box<dyn Fn(Side) + Send + Sync>;

/// The proxy. Dropping it closes its connections.
pub struct Proxy {
    /// Address for the source.
    pub address: String,
    shared: Arc<Shared>,
}

struct Shared {
    fault: Option<Fault>,
    later: AtomicU32,
    fired: AtomicBool,
    over: AtomicBool,
    last_round: AtomicU32,
    /// All sockets connected before the fault.
    ends: Mutex<Vec<TcpStream>>,
    kill: Kill,
}

impl Proxy {
    /// Passes connections on to `to`, unchanged without a `fault`.
    ///
    /// # Errors
    /// The host has no free port.
    pub fn start(to: &str, fault: Option<Fault>, kill: Kill) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(host("listening"))?;
        let address = listener.local_addr().map_err(host("listening"))?.to_string();
        let shared = Arc::new(Shared {
            fault,
            later: AtomicU32::new(fault.map_or(0, |fault| fault.later)),
            fired: AtomicBool::new(false),
            over: AtomicBool::new(false),
            last_round: AtomicU32::new(u32::MAX),
            ends: Mutex::default(),
            kill,
        });
        let (to, served) = (to.to_owned(), Arc::clone(&shared));
        std::thread::spawn(move || {
            while let Ok((source, _)) = listener.accept() {
                if served.over.load(Ordering::Relaxed) {
                    break;
                }
                // The destination may be dead.
                let Ok(destination) = TcpStream::connect(&to) else { continue };
                let Ok(pump) = Pump::of(&served, source, destination) else { continue };
                pump.into_iter().for_each(|pump| drop(std::thread::spawn(move || pump.run())));
            }
        });
        Ok(Self { address, shared })
    }

    /// Whether the fault was injected.
    pub fn has_fired(&self) -> bool {
        self.shared.fired.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        self.shared.close();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(&self.address);
    }
}

impl Shared {
    fn close(&self) {
        self.ends().drain(..).for_each(|end| close(&end));
    }

    fn ends(&self) -> MutexGuard<'_, Vec<TcpStream>> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the fault if this is its frame, once.
    fn fault_for(&self, side: Side, frame: &Frame) -> Option<Fault> {
        let fault = self.fault.filter(|fault| fault.stage.side() == side)?;
        if self.fired.load(Ordering::SeqCst)
            || !fault.stage.is(frame, self.last_round.load(Ordering::SeqCst))
        {
            return None;
        }
        let more = |later: u32| later.checked_sub(1);
        let later = self.later.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more);
        let first = later.is_err() && !self.fired.swap(true, Ordering::SeqCst);
        first.then_some(fault)
    }
}

/// One direction of a connection.
struct Pump {
    shared: Arc<Shared>,
    side: Side,
    from: TcpStream,
    to: TcpStream,
    /// Whether it was connected after the fault.
    is_later: bool,
    writer: Arc<Mutex<Option<[FrameWriter; 2]>>>,
}

impl Pump {
    fn of(
        shared: &Arc<Shared>,
        source: TcpStream,
        destination: TcpStream,
    ) -> io::Result<[Self; 2]> {
        let is_later = shared.fired.load(Ordering::SeqCst);
        let copies = [source.try_clone()?, destination.try_clone()?];
        let back = [source.try_clone()?, destination.try_clone()?];
        shared.ends().extend(copies);
        let [back_to, back_from] = back;
        let writer = Arc::new(Mutex::new(None));
        let pump = |side, from, to| Self {
            shared: Arc::clone(shared),
            side,
            from,
            to,
            is_later,
            writer: Arc::clone(&writer),
        };
        Ok([pump(Side::Source, source, destination), pump(Side::Destination, back_from, back_to)])
    }

    /// Until either side closes.
    fn run(mut self) {
        let mut held: Option<Frame> = None;
        while let Ok(mut frame) = Frame::read(&mut self.from) {
            if frame.kind == ROUND_START && frame.word(4) != 0 {
                self.shared.last_round.store(frame.word(0), Ordering::SeqCst);
            }
            self.forges().then(|| self.seal(&mut frame));
            let fault = if self.is_later { None } else { self.shared.fault_for(self.side, &frame) };
            if self.is_stalled() {
                return self.wait();
            }
            let passed = match fault {
                None => self.pass(&frame),
                Some(fault) if fault.kind == FaultKind::Reorder => {
                    held = Some(frame);
                    continue;
                }
                Some(fault) => self.inject(fault, frame),
            };
            let then = held.take().map_or(Ok(()), |held| self.pass(&held));
            if passed.and(then).is_err() {
                break;
            }
        }
        close(&self.from);
        close(&self.to);
    }

    fn pass(&mut self, frame: &Frame) -> io::Result<()> {
        self.to.write_all(&frame.bytes)
    }

    fn inject(&mut self, fault: Fault, mut frame: Frame) -> io::Result<()> {
        let mut random = fastrand::Rng::with_seed(fault.seed);
        match fault.kind {
            FaultKind::Cut => self.shared.close(),
            FaultKind::CutBehind => {
                self.pass(&frame)?;
                self.shared.close();
            }
            FaultKind::CutWithin => {
                let half = frame.bytes.get(..frame.bytes.len() / 2).unwrap_or_default();
                self.to.write_all(half)?;
                self.shared.close();
            }
            FaultKind::Stall => self.wait(),
            FaultKind::Corrupt => {
                frame.flip(&mut random);
                self.pass(&frame)?;
            }
            FaultKind::Repeat => {
                self.pass(&frame)?;
                self.pass(&frame)?;
            }
            FaultKind::Forge => {
                frame.forge(&mut random);
                // Its checksum is that of its position in the connection.
                if let Some(mut writer) = frame.sealed {
                    frame.bytes = writer.frame(frame.kind, frame.body(), frame.payload());
                }
                self.pass(&frame)?;
            }
            FaultKind::KillSource => (self.shared.kill)(Side::Source),
            FaultKind::KillDestination => (self.shared.kill)(Side::Destination),
            FaultKind::Reorder => {}
        }
        match fault.kind {
            FaultKind::Corrupt | FaultKind::Repeat | FaultKind::Forge => Ok(()),
            _ => Err(io::ErrorKind::ConnectionAborted.into()),
        }
    }

    fn forges(&self) -> bool {
        self.shared.fault.is_some_and(|fault| fault.kind == FaultKind::Forge)
    }

    /// Tracks the position of a frame in its connection, to recompute its checksum.
    fn seal(&self, frame: &mut Frame) {
        let mut writers = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if frame.kind == HELLO && self.side == Side::Source {
            let id = frame.body().get(HELLO_ID..).and_then(<[u8]>::first_chunk);
            let index = frame.body().get(HELLO_INDEX).copied();
            if let (Some(id), Some(index)) = (id, index) {
                let writer = |is_source| FrameWriter::keyed(MigrationId(*id), index, is_source);
                *writers = Some([writer(true), writer(false)]);
            }
            return;
        }
        let number = usize::from(self.side == Side::Destination);
        if let Some(writer) = writers.as_mut().and_then(|writers| writers.get_mut(number)) {
            frame.sealed = Some(*writer);
            // Advances the position.
            writer.frame(frame.kind, &[], &[]);
        }
    }

    fn is_stalled(&self) -> bool {
        let stalls = self.shared.fault.is_some_and(|fault| fault.kind == FaultKind::Stall);
        stalls && !self.is_later && self.shared.fired.load(Ordering::SeqCst)
    }

    /// Blocks until the proxy is dropped.
    fn wait(&self) {
        while !self.shared.over.load(Ordering::Relaxed) {
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}

/// A frame.
struct Frame {
    kind: u16,
    bytes: Vec<u8>,
    body_bytes: usize,
    sealed: Option<FrameWriter>,
}

impl Frame {
    fn read(from: &mut TcpStream) -> io::Result<Self> {
        let mut bytes = vec![0; HEAD_BYTES];
        from.read_exact(&mut bytes)?;
        let length = |at: usize| {
            let bytes = bytes.get(at..).and_then(<[u8]>::first_chunk).copied();
            usize::try_from(u32::from_le_bytes(bytes.unwrap_or_default())).unwrap_or(usize::MAX)
        };
        let kind = bytes.get(KIND..).and_then(<[u8]>::first_chunk).copied();
        let kind = u16::from_le_bytes(kind.unwrap_or_default());
        let (body_bytes, payload_bytes) = (length(BODY), length(PAYLOAD));
        bytes.resize(HEAD_BYTES + body_bytes + payload_bytes, 0);
        from.read_exact(bytes.get_mut(HEAD_BYTES..).unwrap_or_default())?;
        Ok(Self { kind, bytes, body_bytes, sealed: None })
    }

    fn body(&self) -> &[u8] {
        self.bytes.get(HEAD_BYTES..HEAD_BYTES + self.body_bytes).unwrap_or_default()
    }

    fn payload(&self) -> &[u8] {
        self.bytes.get(HEAD_BYTES + self.body_bytes..).unwrap_or_default()
    }

    /// A 32-bit number in its body.
    fn word(&self, at: usize) -> u32 {
        let bytes = self.body().get(at..).and_then(<[u8]>::first_chunk).copied();
        u32::from_le_bytes(bytes.unwrap_or_default())
    }

    /// Flips a bit: in the checksum if the frame has no body, and never in the lengths, which would
    /// only make the receiver wait for more.
    fn flip(&mut self, random: &mut fastrand::Rng) {
        let len = self.bytes.len();
        let at = if len > HEAD_BYTES { random.usize(HEAD_BYTES..len) } else { random.usize(..8) };
        if let Some(byte) = self.bytes.get_mut(at) {
            *byte ^= 1 << random.u8(..8);
        }
    }

    /// Changes a few fields like an attacker: numbers become large or small. The checksum of a
    /// state part is correct.
    fn forge(&mut self, random: &mut fastrand::Rng) {
        let body = HEAD_BYTES..HEAD_BYTES + self.body_bytes;
        let range = if self.kind == STATE { body.end..self.bytes.len() } else { body };
        let Some(bytes) = self.bytes.get_mut(range).filter(|bytes| !bytes.is_empty()) else {
            return;
        };
        for _ in 0..random.usize(1..=3) {
            let (at, many) = (random.usize(..bytes.len()), random.usize(1..=8));
            let value = [0u8, 1, 0x7f, 0x80, 0xff][random.usize(..5)];
            bytes.iter_mut().skip(at).take(many).for_each(|byte| *byte = value);
        }
        if self.kind == STATE {
            let long = |at: usize| u64::from(self.word(at)) | u64::from(self.word(at + 4)) << 32;
            let fields = [u64::from(self.word(0)), u64::from(self.word(4)), long(8), long(16)];
            let sum = content_sum(self.payload(), fields).to_le_bytes();
            if let Some(to) = self.bytes.get_mut(HEAD_BYTES + 24..HEAD_BYTES + 32) {
                to.copy_from_slice(&sum);
            }
        }
    }
}

/// Closes a connection. An error means that it is closed already.
fn close(stream: &TcpStream) {
    let _ = stream.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that arrive of a source's three frames with a fault.
    fn passed(kind: FaultKind) -> Vec<u8> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap().to_string();
        let fault = Fault { stage: Stage::FirstPages, later: 1, kind, seed: 1 };
        let proxy = Proxy::start(&to, Some(fault), Box::new(|_| {})).unwrap();
        let mut source = TcpStream::connect(&proxy.address).unwrap();
        let (mut destination, _) = listener.accept().unwrap();
        source.write_all(&frames()).unwrap();
        let _ = source.shutdown(Shutdown::Write);
        let mut received = Vec::new();
        // A cut connection may return an error.
        let _ = destination.read_to_end(&mut received);
        assert!(proxy.has_fired());
        received
    }

    fn frames() -> Vec<u8> {
        let mut writer = FrameWriter::keyed(MigrationId([3; 16]), 0, true);
        (0..3u8).flat_map(|number| writer.frame(CHUNK, &[0, 0, 0, 0, number], &[number])).collect()
    }

    #[test]
    fn a_fault_changes_only_its_frame() {
        let whole = frames();
        let (len, one) = (whole.len(), whole.len() / 3);
        let (first, second, third) = (&whole[..one], &whole[one..2 * one], &whole[2 * one..]);
        assert_eq!(passed(FaultKind::Cut), first);
        assert_eq!(passed(FaultKind::CutBehind), whole[..2 * one]);
        assert_eq!(passed(FaultKind::CutWithin), whole[..one + one / 2]);
        assert_eq!(passed(FaultKind::Reorder), [first, third, second].concat());
        assert_eq!(passed(FaultKind::Repeat), [first, second, second, third].concat());
        let corrupt = passed(FaultKind::Corrupt);
        let bits = |(a, b): (&u8, &u8)| (a ^ b).count_ones();
        assert_eq!((corrupt.len(), corrupt.iter().zip(&whole).map(bits).sum::<u32>()), (len, 1));
        assert_eq!((&corrupt[..one], &corrupt[2 * one..]), (first, third));
    }
}
