//! A network between two sides of a migration that fails in one moment of it.
//!
//! It knows frames (docs/migration.md, "Bytes") and passes them on, one by one, until the one that
//! was chosen comes by. What is connected later is left alone, so that a doubt can be resolved.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use migration::MigrationId;
use migration::raw::{Speaker, content_sum};

use crate::error::{Result, host};

/// A frame's head, and where its kind and the lengths of body and payload are.
const HEAD_BYTES: usize = 24;
const KIND: usize = 8;
const BODY: usize = 12;
const PAYLOAD: usize = 16;

/// Where a hello's body has the number of its connection and the migration's id.
const HELLO_INDEX: usize = 13;
const HELLO_ID: usize = 16;

/// Kinds of frames.
const CHUNK: u16 = 6;
const ROUND_START: u16 = 5;
const STATE: u16 = 10;
const HELLO: u16 = 1;

/// Between two looks of a connection that stalls.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Which side a frame comes from, or which one is to be killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the guest is at first.
    Source,
    /// Where it goes.
    Destination,
}

/// The moment at which something fails: when the first such frame comes by, or one of the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The source greets.
    Hello,
    /// The destination greets.
    Welcome,
    /// The source describes the guest.
    Describe,
    /// The destination has made it.
    Ready,
    /// The first round begins.
    FirstRound,
    /// Pages of the first round go.
    FirstPages,
    /// The first round is over.
    RoundDone,
    /// Pages of a later round go.
    LaterPages,
    /// The guest stands; the last round begins.
    LastRound,
    /// Pages of the last round go.
    LastPages,
    /// State goes.
    State,
    /// All of the state went.
    StateEnd,
    /// The destination could run the guest.
    Prepared,
    /// The source gives it away.
    HandOver,
    /// The destination runs it.
    Running,
}

impl Moment {
    /// All of them, in their order.
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
        Self::HandOver,
        Self::Running,
    ];

    /// One of many frames that go in this direction: what follows it is known to come.
    pub(super) const fn is_of_many(self) -> bool {
        matches!(self, Self::FirstPages | Self::LaterPages | Self::LastPages | Self::State)
    }

    /// The destination may have the guest, and not know whether it runs at the source.
    pub const fn is_in_the_change(self) -> bool {
        matches!(self, Self::Prepared | Self::HandOver | Self::Running)
    }

    /// Who says it.
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
            Self::HandOver => frame.kind == 13,
            Self::Running => frame.kind == 14,
        }
    }
}

/// What happens then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// Every connection breaks before the frame.
    Cut,
    /// Every connection breaks behind it.
    CutBehind,
    /// Every connection breaks in the middle of it.
    CutWithin,
    /// Nothing goes any more, in either direction, and nobody says so.
    Stall,
    /// A bit of it changes.
    Corrupt,
    /// It comes behind the next one of its connection.
    Reorder,
    /// It comes twice.
    Repeat,
    /// Whoever says it is hostile: parts of it change, and its check sums are right.
    Forge,
    /// The source's process is killed.
    KillSource,
    /// The destination's process is killed.
    KillDestination,
}

impl Harm {
    /// All of them.
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

    /// Whether it makes a difference in this moment, and one that shows: pages that are forged well
    /// are pages of another guest, and whom a destination lets in may send those.
    pub const fn fits(self, moment: Moment) -> bool {
        match self {
            Self::Reorder | Self::Repeat => moment.is_of_many(),
            Self::Forge => {
                let says_nothing = matches!(moment, Moment::Hello | Moment::HandOver);
                !says_nothing && (!moment.is_of_many() || matches!(moment, Moment::State))
            }
            _ => true,
        }
    }

    /// Which side's process it ends.
    pub const fn kills(self) -> Option<Side> {
        match self {
            Self::KillSource => Some(Side::Source),
            Self::KillDestination => Some(Side::Destination),
            _ => None,
        }
    }
}

/// What is to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// When.
    pub moment: Moment,
    /// So many such frames later.
    pub later: u32,
    /// What.
    pub harm: Harm,
    /// Chooses what changes.
    pub seed: u64,
}

/// Ends a process.
pub type Kill = Box<dyn Fn(Side) + Send + Sync>;

/// The network. It goes with this.
pub struct Proxy {
    /// Where the source is to connect to.
    pub address: String,
    shared: Arc<Shared>,
}

struct Shared {
    fault: Option<Fault>,
    later: AtomicU32,
    fired: AtomicBool,
    over: AtomicBool,
    last_round: AtomicU32,
    /// All ends of what was connected before the fault.
    ends: Mutex<Vec<TcpStream>>,
    kill: Kill,
}

impl Proxy {
    /// Passes connections on to `to`; without a `fault` all of them, whole.
    ///
    /// # Errors
    /// The host has no port left.
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
                // The destination may be dead by then.
                let Ok(destination) = TcpStream::connect(&to) else { continue };
                let Ok(pump) = Pump::of(&served, source, destination) else { continue };
                pump.into_iter().for_each(|pump| drop(std::thread::spawn(move || pump.run())));
            }
        });
        Ok(Self { address, shared })
    }

    /// Whether the moment has come.
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

    /// The fault, if this is its frame. Once.
    fn strikes(&self, side: Side, frame: &Frame) -> Option<Fault> {
        let fault = self.fault.filter(|fault| fault.moment.side() == side)?;
        if self.fired.load(Ordering::SeqCst)
            || !fault.moment.is(frame, self.last_round.load(Ordering::SeqCst))
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
    /// Connected after the fault.
    is_later: bool,
    speaker: Arc<Mutex<Option<[Speaker; 2]>>>,
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
        let speaker = Arc::new(Mutex::new(None));
        let pump = |side, from, to| Self {
            shared: Arc::clone(shared),
            side,
            from,
            to,
            is_later,
            speaker: Arc::clone(&speaker),
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
            let strikes = if self.is_later { None } else { self.shared.strikes(self.side, &frame) };
            if self.is_stalled() {
                return self.wait();
            }
            let passed = match strikes {
                None => self.pass(&frame),
                Some(fault) if fault.harm == Harm::Reorder => {
                    held = Some(frame);
                    continue;
                }
                Some(fault) => self.harm(fault, frame),
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

    fn harm(&mut self, fault: Fault, mut frame: Frame) -> io::Result<()> {
        let mut random = fastrand::Rng::with_seed(fault.seed);
        match fault.harm {
            Harm::Cut => self.shared.close(),
            Harm::CutBehind => {
                self.pass(&frame)?;
                self.shared.close();
            }
            Harm::CutWithin => {
                let half = frame.bytes.get(..frame.bytes.len() / 2).unwrap_or_default();
                self.to.write_all(half)?;
                self.shared.close();
            }
            Harm::Stall => self.wait(),
            Harm::Corrupt => {
                frame.flip(&mut random);
                self.pass(&frame)?;
            }
            Harm::Repeat => {
                self.pass(&frame)?;
                self.pass(&frame)?;
            }
            Harm::Forge => {
                frame.forge(&mut random);
                // It was sealed as it was read, which is where it is in its connection.
                if let Some(mut speaker) = frame.sealed {
                    frame.bytes = speaker.frame(frame.kind, frame.body(), frame.payload());
                }
                self.pass(&frame)?;
            }
            Harm::KillSource => (self.shared.kill)(Side::Source),
            Harm::KillDestination => (self.shared.kill)(Side::Destination),
            Harm::Reorder => {}
        }
        match fault.harm {
            Harm::Corrupt | Harm::Repeat | Harm::Forge => Ok(()),
            _ => Err(io::ErrorKind::ConnectionAborted.into()),
        }
    }

    fn forges(&self) -> bool {
        self.shared.fault.is_some_and(|fault| fault.harm == Harm::Forge)
    }

    /// Keeps where a frame is in its connection, with which its check sum can be made again.
    fn seal(&self, frame: &mut Frame) {
        let mut speakers = self.speaker.lock().unwrap_or_else(PoisonError::into_inner);
        if frame.kind == HELLO && self.side == Side::Source {
            let id = frame.body().get(HELLO_ID..).and_then(<[u8]>::first_chunk);
            let index = frame.body().get(HELLO_INDEX).copied();
            if let (Some(id), Some(index)) = (id, index) {
                let speaker = |is_source| Speaker::keyed(MigrationId(*id), index, is_source);
                *speakers = Some([speaker(true), speaker(false)]);
            }
            return;
        }
        let number = usize::from(self.side == Side::Destination);
        if let Some(speaker) = speakers.as_mut().and_then(|speakers| speakers.get_mut(number)) {
            frame.sealed = Some(*speaker);
            // Counts it.
            speaker.frame(frame.kind, &[], &[]);
        }
    }

    fn is_stalled(&self) -> bool {
        let stalls = self.shared.fault.is_some_and(|fault| fault.harm == Harm::Stall);
        stalls && !self.is_later && self.shared.fired.load(Ordering::SeqCst)
    }

    /// Nothing is heard of either side any more.
    fn wait(&self) {
        while !self.shared.over.load(Ordering::Relaxed) {
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}

/// A frame as it came.
struct Frame {
    kind: u16,
    bytes: Vec<u8>,
    body_bytes: usize,
    sealed: Option<Speaker>,
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

    /// A number in its body.
    fn word(&self, at: usize) -> u32 {
        let bytes = self.body().get(at..).and_then(<[u8]>::first_chunk).copied();
        u32::from_le_bytes(bytes.unwrap_or_default())
    }

    /// Changes a bit: of the check sum where there is nothing else, and not of the lengths, which
    /// would only have more waited for.
    fn flip(&mut self, random: &mut fastrand::Rng) {
        let len = self.bytes.len();
        let at = if len > HEAD_BYTES { random.usize(HEAD_BYTES..len) } else { random.usize(..8) };
        if let Some(byte) = self.bytes.get_mut(at) {
            *byte ^= 1 << random.u8(..8);
        }
    }

    /// Changes some of it, as somebody would who looks for trouble: numbers become large or small,
    /// and most is left as it was. The sum of a state's part is right.
    fn forge(&mut self, random: &mut fastrand::Rng) {
        let body = HEAD_BYTES..HEAD_BYTES + self.body_bytes;
        let place = if self.kind == STATE { body.end..self.bytes.len() } else { body };
        let Some(bytes) = self.bytes.get_mut(place).filter(|bytes| !bytes.is_empty()) else {
            return;
        };
        for _ in 0..random.usize(1..=3) {
            let (at, many) = (random.usize(..bytes.len()), random.usize(1..=8));
            let value = [0u8, 1, 0x7f, 0x80, 0xff][random.usize(..5)];
            bytes.iter_mut().skip(at).take(many).for_each(|byte| *byte = value);
        }
        if self.kind == STATE {
            let long = |at: usize| u64::from(self.word(at)) | u64::from(self.word(at + 4)) << 32;
            let place = [u64::from(self.word(0)), u64::from(self.word(4)), long(8), long(16)];
            let sum = content_sum(self.payload(), place).to_le_bytes();
            if let Some(to) = self.bytes.get_mut(HEAD_BYTES + 24..HEAD_BYTES + 32) {
                to.copy_from_slice(&sum);
            }
        }
    }
}

/// One that is closed already is closed.
fn close(stream: &TcpStream) {
    let _ = stream.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a fault makes of three frames that a source says.
    fn passed(harm: Harm) -> Vec<u8> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap().to_string();
        let fault = Fault { moment: Moment::FirstPages, later: 1, harm, seed: 1 };
        let proxy = Proxy::start(&to, Some(fault), Box::new(|_| {})).unwrap();
        let mut source = TcpStream::connect(&proxy.address).unwrap();
        let (mut destination, _) = listener.accept().unwrap();
        source.write_all(&frames()).unwrap();
        source.shutdown(Shutdown::Write).unwrap();
        let mut heard = Vec::new();
        // Where it is cut, the other end may be told so.
        let _ = destination.read_to_end(&mut heard);
        assert!(proxy.has_fired());
        heard
    }

    fn frames() -> Vec<u8> {
        let mut speaker = Speaker::keyed(MigrationId([3; 16]), 0, true);
        (0..3u8).flat_map(|number| speaker.frame(CHUNK, &[0, 0, 0, 0, number], &[number])).collect()
    }

    #[test]
    fn one_frame_is_harmed_and_no_other() {
        let whole = frames();
        let (len, one) = (whole.len(), whole.len() / 3);
        let (first, second, third) = (&whole[..one], &whole[one..2 * one], &whole[2 * one..]);
        assert_eq!(passed(Harm::Cut), first);
        assert_eq!(passed(Harm::CutBehind), whole[..2 * one]);
        assert_eq!(passed(Harm::CutWithin), whole[..one + one / 2]);
        assert_eq!(passed(Harm::Reorder), [first, third, second].concat());
        assert_eq!(passed(Harm::Repeat), [first, second, second, third].concat());
        let corrupt = passed(Harm::Corrupt);
        let bits = |(a, b): (&u8, &u8)| (a ^ b).count_ones();
        assert_eq!((corrupt.len(), corrupt.iter().zip(&whole).map(bits).sum::<u32>()), (len, 1));
        assert_eq!((&corrupt[..one], &corrupt[2 * one..]), (first, third));
    }
}
