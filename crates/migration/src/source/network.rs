//! What the source says over its connections.

use std::sync::Arc;
use std::time::Duration;

use page_set::PageSet;

use super::pause_limit::PauseLimit;
use super::round::{self, RoundContext};
use super::{Sink, SourceConfig, SwitchoverResult};
use crate::bandwidth::Bandwidth;
use crate::error::MigrationError;
use crate::limits::{MAX_FILL_RANGES, MAX_PAYLOAD_BYTES, MAX_STATE_BYTES, MAX_STATE_SECTIONS};
use crate::link::{Closer, Connect, Link};
use crate::selection::Plan;
use crate::summary::RoundSummary;
use crate::traits::{Description, StateSection};
use crate::wire::chunk::{Fill, StatePart};
use crate::wire::control::{
    CAPABILITY_ZSTD, Control, Hello, MigrationId, PeerStatus, Purpose, VERSIONS,
};
use crate::wire::frame::Kind;
use crate::wire::stream::{Side, Stream};

/// How long a peer that hung up may have had a last word.
const LAST_WORD: Duration = Duration::from_millis(500);

/// The connections to a destination.
pub(super) struct Network<L> {
    streams: Vec<Stream<L>>,
    closers: Arc<[Closer]>,
    limit: Option<Bandwidth>,
    level: Option<i32>,
    stall: Duration,
    stall_paused: Duration,
    /// How long the guest may stand still, and the time since it does.
    max_paused: Duration,
    pause_limit: Option<PauseLimit>,
    /// The destination may have all of the guest, and wait.
    state_was_sent: bool,
}

const NO_STREAM: MigrationError = MigrationError::Closed;
const UNEXPECTED: MigrationError = MigrationError::Peer { what: "a message out of its turn" };

/// What says hello.
pub(super) fn hello(id: MigrationId, purpose: Purpose, index: u8, count: u8) -> Hello {
    Hello { versions: VERSIONS, purpose, index, count, id, capabilities: CAPABILITY_ZSTD }
}

impl<L: Link> Network<L> {
    /// Opens all connections and says hello on each.
    pub(super) fn connect<C: Connect<Link = L>>(
        config: &SourceConfig,
        id: MigrationId,
        connect: &mut C,
    ) -> Result<Self, MigrationError> {
        let count = u8::try_from(config.connections).unwrap_or(u8::MAX);
        let (mut streams, mut closers) = (Vec::new(), Vec::new());
        for index in 0..count {
            let link = connect.connect().map_err(|source| MigrationError::Connect { source })?;
            let mut stream = Stream::new(link, config.stall)?;
            let hello = hello(id, Purpose::Migrate, index, count);
            stream.send(&Control::Hello(hello.clone()))?;
            stream.key(&hello, Side::Source);
            closers.push(stream.closer()?);
            streams.push(stream);
        }
        Ok(Self {
            streams,
            closers: closers.into(),
            limit: config.bandwidth.map(Bandwidth::new),
            level: config.compression,
            stall: config.stall,
            stall_paused: config.stall_paused,
            max_paused: config.max_downtime.saturating_add(config.paused_beyond),
            pause_limit: None,
            state_was_sent: false,
        })
    }

    /// True where the destination may have all of the guest, and wait for a word.
    pub(super) const fn may_hold_the_guest(&self) -> bool {
        self.state_was_sent
    }

    /// The connection on which everything but pages goes.
    fn first(&mut self) -> Result<&mut Stream<L>, MigrationError> {
        self.streams.first_mut().ok_or(NO_STREAM)
    }

    fn send_fills(
        &mut self,
        context: &RoundContext<'_>,
        plan: &Plan,
    ) -> Result<u64, MigrationError> {
        let mut pages = 0;
        let round = context.number;
        for (&pattern, set) in &plan.fills {
            for ranges in pieces(context, set).chunks(MAX_FILL_RANGES) {
                let fill = Fill { round, pattern, ranges: ranges.to_vec() };
                pages += fill.pages();
                self.first()?.push(Kind::Fill, &fill.encode(), &[])?;
            }
        }
        Ok(pages)
    }

    /// Ends the time for which the guest may stand still, unless it is over.
    fn end_pause_limit(&mut self) -> Result<(), MigrationError> {
        let is_over = self.pause_limit.take().is_some_and(|mut limit| limit.end());
        if is_over { Err(MigrationError::TooSlow { limit: self.max_paused }) } else { Ok(()) }
    }

    fn send_round(
        &mut self,
        context: &mut RoundContext<'_>,
        plan: &Plan,
    ) -> Result<RoundSummary, MigrationError> {
        let (round, last) = (context.number, context.last);
        let fills: u64 = plan.fills.values().map(PageSet::len).sum();
        let start = Control::RoundStart { round, last, pages: plan.pages + fills };
        self.first()?.send(&start)?;
        let filled_pages = self.send_fills(context, plan)?;
        let (streams, closers) = (&mut self.streams[..], &self.closers[..]);
        let limit = self.limit.as_ref();
        let sent = round::send(context, &plan.words, streams, closers, self.level, limit);
        let mut sum = match sent {
            Ok(sum) => sum,
            Err(_) if context.config.cancel.load(std::sync::atomic::Ordering::Relaxed) => {
                return Err(MigrationError::Cancelled);
            }
            Err(error) => return Err(self.last_word(error)),
        };
        sum.filled_pages = filled_pages;
        // What follows the last round says that it arrived.
        if !last {
            match self.first()?.receive()? {
                Control::RoundDone { round: done, .. } if done == round => {}
                _ => return Err(UNEXPECTED),
            }
        }
        Ok(sum)
    }

    fn send_state(&mut self, state: &[StateSection]) -> Result<Duration, MigrationError> {
        check_state(state)?;
        let first = self.streams.first_mut().ok_or(NO_STREAM)?;
        for (index, section) in (0..).zip(state) {
            send_section(first, index, section)?;
        }
        let bytes = state.iter().map(|section| section.bytes.len() as u64).sum();
        let sections = u32::try_from(state.len()).unwrap_or(u32::MAX);
        self.state_was_sent = true;
        first.send(&Control::StateEnd { sections, bytes })?;
        match first.receive() {
            Ok(Control::Prepared { load_us }) => Ok(Duration::from_micros(load_us)),
            Ok(_) => Err(UNEXPECTED),
            Err(error) => {
                // One that says that it gave up holds nothing.
                self.state_was_sent = !matches!(error, MigrationError::GivenUp { .. });
                Err(error)
            }
        }
    }

    /// A peer that hung up may have said why.
    fn last_word(&mut self, error: MigrationError) -> MigrationError {
        if !matches!(error, MigrationError::Closed | MigrationError::Cancelled) {
            return error;
        }
        for stream in &mut self.streams {
            if stream.set_timeout(LAST_WORD).is_err() {
                continue;
            }
            if let Err(said @ MigrationError::GivenUp { .. }) = stream.receive() {
                return said;
            }
        }
        error
    }
}

/// The ranges of `set`, each in one region.
fn pieces(context: &RoundContext<'_>, set: &PageSet) -> Vec<page_set::PageRange> {
    context.layout.regions().iter().flat_map(|region| set.ranges_in(*region)).collect()
}

impl<L: Link> Sink for Network<L> {
    fn open(&mut self, description: &Description) -> Result<(), MigrationError> {
        match self.first()?.receive()? {
            Control::Welcome { version, capabilities } => {
                if !(VERSIONS.0..=VERSIONS.1).contains(&version) {
                    return Err(MigrationError::Version { min: version, max: version });
                }
                if capabilities & CAPABILITY_ZSTD == 0 {
                    self.level = None;
                }
            }
            _ => return Err(UNEXPECTED),
        }
        self.first()?.send(&Control::Describe(description.clone()))?;
        match self.first()?.receive()? {
            Control::Ready => Ok(()),
            _ => Err(UNEXPECTED),
        }
    }

    fn round(
        &mut self,
        context: &mut RoundContext<'_>,
        plan: &Plan,
    ) -> Result<RoundSummary, MigrationError> {
        self.send_round(context, plan).or_else(|error| self.end_pause_limit().and(Err(error)))
    }

    fn paused(&mut self, paused: bool) -> Result<(), MigrationError> {
        self.end_pause_limit()?;
        if paused {
            self.pause_limit = Some(PauseLimit::start(&self.closers, self.max_paused)?);
        }
        let time = if paused { self.stall_paused } else { self.stall };
        self.streams.iter().try_for_each(|stream| stream.set_timeout(time))
    }

    fn state(&mut self, state: &[StateSection]) -> Result<Duration, MigrationError> {
        let loaded = self.send_state(state);
        // Whose the guest is once it was offered is not for this side to say.
        self.end_pause_limit()?;
        loaded
    }

    fn switch_over(&mut self) -> SwitchoverResult {
        let Some(first) = self.streams.first_mut() else {
            return SwitchoverResult::Refused(NO_STREAM);
        };
        // From here on it may arrive, whatever is said of sending it.
        if let Err(error) = first.send(&Control::Commit) {
            return SwitchoverResult::Unknown(error);
        }
        match first.receive() {
            Ok(Control::Running { resume_us }) => {
                SwitchoverResult::Taken(Duration::from_micros(resume_us))
            }
            Ok(Control::Refused) => {
                self.state_was_sent = false;
                let reason = "it could not start the guest".to_owned();
                SwitchoverResult::Refused(MigrationError::GivenUp { reason })
            }
            Ok(_) => SwitchoverResult::Unknown(UNEXPECTED),
            Err(error) => SwitchoverResult::Unknown(error),
        }
    }

    fn abort(&mut self, error: &MigrationError) {
        let reason = error.chain();
        let told = self.first().and_then(|first| {
            first.set_timeout(LAST_WORD)?;
            first.send(&Control::Abort { reason })
        });
        if told.is_ok() && self.state_was_sent {
            let heard = self.first().and_then(Stream::receive);
            self.state_was_sent = !matches!(
                heard,
                Ok(Control::Status(PeerStatus::Gone)) | Err(MigrationError::GivenUp { .. })
            );
        }
        self.closers.iter().for_each(|close| close());
    }

    fn runs_elsewhere(&self) -> bool {
        true
    }

    fn wire_bytes(&self) -> u64 {
        self.streams.iter().map(|stream| stream.sent_bytes).sum()
    }
}

/// Checks what a monitor says of its own guest.
pub(crate) fn check_state(state: &[StateSection]) -> Result<(), MigrationError> {
    let bytes: u64 = state.iter().map(|section| section.bytes.len() as u64).sum();
    let named = |section: &StateSection| {
        section.name.len() <= crate::limits::MAX_NAME_BYTES
            && section.name.bytes().all(|byte| matches!(byte, b' '..=b'~'))
    };
    if state.len() > MAX_STATE_SECTIONS || bytes > MAX_STATE_BYTES || !state.iter().all(named) {
        let error = "its state is too large, or has names that are no names";
        return Err(MigrationError::machine("saving the guest's state")(error.into()));
    }
    Ok(())
}

fn send_section<L: Link>(
    stream: &mut Stream<L>,
    index: u32,
    section: &StateSection,
) -> Result<(), MigrationError> {
    let total = section.bytes.len() as u64;
    let mut offset = 0;
    // An empty section has one part too.
    let mut chunks = section.bytes.chunks(MAX_PAYLOAD_BYTES);
    let mut next = Some(chunks.next().unwrap_or_default());
    while let Some(bytes) = next {
        let (version, name) = (section.version, section.name.clone());
        let mut part = StatePart { index, version, total, offset, sum: 0, name };
        part.sum = part.sum_of(bytes);
        stream.push(Kind::State, &part.encode(), bytes)?;
        offset += bytes.len() as u64;
        next = chunks.next();
    }
    Ok(())
}
