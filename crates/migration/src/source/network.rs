//! The source's side of the wire protocol.

use std::sync::Arc;
use std::time::Duration;

use page_set::PageSet;

use super::pause_limit::PauseLimit;
use super::round::{self, RoundContext};
use super::{Sink, SourceConfig, SwitchoverResult};
use crate::bandwidth::Bandwidth;
use crate::error::MigrationError;
use crate::limits::{
    MAX_FILL_RANGES, MAX_PAYLOAD_BYTES, MAX_STATE_BYTES, MAX_STATE_SECTIONS, VERSIONS,
};
use crate::link::{Closer, Connect, Link};
use crate::selection::Plan;
use crate::summary::RoundSummary;
use crate::traits::{Description, StateSection};
use crate::wire::chunk::{Fill, StatePart};
use crate::wire::control::{CAPABILITY_ZSTD, Control, Hello, MigrationId, PeerStatus, Purpose};
use crate::wire::frame::Kind;
use crate::wire::stream::{Side, Stream};

/// How long to wait for an abort message of a peer that closed its connections, and for one to be
/// sent.
const ABORT_TIMEOUT: Duration = Duration::from_millis(500);

/// The connections to a destination.
pub(super) struct Network<L> {
    streams: Vec<Stream<L>>,
    closers: Arc<[Closer]>,
    limit: Option<Bandwidth>,
    level: Option<i32>,
    stall: Duration,
    stall_paused: Duration,
    /// Limit of the downtime, and its timer while the guest is paused.
    max_paused: Duration,
    pause_limit: Option<PauseLimit>,
    /// The destination may be prepared.
    may_be_prepared: bool,
}

const NO_STREAM: MigrationError = MigrationError::Closed;
const UNEXPECTED: MigrationError = MigrationError::Peer { what: "an unexpected message" };

pub(super) fn hello(id: MigrationId, purpose: Purpose, index: u8, count: u8) -> Hello {
    Hello { versions: VERSIONS, purpose, index, count, id, capabilities: CAPABILITY_ZSTD }
}

impl<L: Link> Network<L> {
    /// Opens all connections and sends a hello on each.
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
            may_be_prepared: false,
        })
    }

    /// True if the destination may be prepared, and wait for the decision.
    pub(super) const fn may_be_prepared(&self) -> bool {
        self.may_be_prepared
    }

    /// The connection that carries every message that is not pages.
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

    /// Stops the downtime timer. Fails if it has expired.
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
            Err(error) => return Err(self.abort_reason(error)),
        };
        sum.filled_pages = filled_pages;
        // The answer to the state confirms the last round.
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
        self.may_be_prepared = true;
        first.send(&Control::StateEnd { sections, bytes })?;
        match first.receive() {
            Ok(Control::Prepared { load_us }) => Ok(Duration::from_micros(load_us)),
            Ok(_) => Err(UNEXPECTED),
            Err(error) => {
                // A destination that aborted has destroyed the guest.
                self.may_be_prepared = !matches!(error, MigrationError::Aborted { .. });
                Err(error)
            }
        }
    }

    /// Returns the reason of a peer that sent an abort before it closed its connections, else
    /// `error`.
    fn abort_reason(&mut self, error: MigrationError) -> MigrationError {
        if !matches!(error, MigrationError::Closed | MigrationError::Cancelled) {
            return error;
        }
        for stream in &mut self.streams {
            if stream.set_timeout(ABORT_TIMEOUT).is_err() {
                continue;
            }
            if let Err(reason @ MigrationError::Aborted { .. }) = stream.receive() {
                return reason;
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
        // After the commit this side must not time out: only the peer's answer says who runs the
        // guest.
        self.end_pause_limit()?;
        loaded
    }

    fn switch_over(&mut self) -> SwitchoverResult {
        let Some(first) = self.streams.first_mut() else {
            return SwitchoverResult::Refused(NO_STREAM);
        };
        // From here on the commit may arrive, even if sending it fails.
        if let Err(error) = first.send(&Control::Commit) {
            return SwitchoverResult::Unknown(error);
        }
        match first.receive() {
            Ok(Control::Running { resume_us }) => {
                SwitchoverResult::Taken(Duration::from_micros(resume_us))
            }
            Ok(Control::Refused) => {
                self.may_be_prepared = false;
                let reason = "it could not start the guest".to_owned();
                SwitchoverResult::Refused(MigrationError::Aborted { reason })
            }
            Ok(_) => SwitchoverResult::Unknown(UNEXPECTED),
            Err(error) => SwitchoverResult::Unknown(error),
        }
    }

    fn abort(&mut self, error: &MigrationError) {
        let reason = error.chain();
        let sent = self.first().and_then(|first| {
            first.set_timeout(ABORT_TIMEOUT)?;
            first.send(&Control::Abort { reason })
        });
        if sent.is_ok() && self.may_be_prepared {
            let answer = self.first().and_then(Stream::receive);
            self.may_be_prepared = !matches!(
                answer,
                Ok(Control::Status(PeerStatus::Gone)) | Err(MigrationError::Aborted { .. })
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

/// Checks the state that this side's VMM saved.
pub(crate) fn check_state(state: &[StateSection]) -> Result<(), MigrationError> {
    let bytes: u64 = state.iter().map(|section| section.bytes.len() as u64).sum();
    let named = |section: &StateSection| {
        section.name.len() <= crate::limits::MAX_NAME_BYTES
            && section.name.bytes().all(|byte| matches!(byte, b' '..=b'~'))
    };
    if state.len() > MAX_STATE_SECTIONS || bytes > MAX_STATE_BYTES || !state.iter().all(named) {
        let error = "the state is too large, or a section name is too long or not printable ASCII";
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
