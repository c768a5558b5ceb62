//! One front end's connection: its requests, in any order it likes.

mod config;

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use balloon_abi::{Features, QueueLayout, Vq};
use balloon_device::RequestFailure;
use balloon_host::{Shared, StatsClock};
use vhost::vhost_user::message::{BackendReq, FrontendReq};
use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};

use crate::busy_poll::BusyPoll;
use crate::config_write_fallback::Silence;
use crate::error::{SessionError, Violation};
use crate::inflight::{self, Region};
use crate::limits::Terms;
use crate::memory::MemoryTable;
use crate::vring::Vring;
use crate::vring_recovery::find;
use crate::wire::{self, Message};

/// Features on top of the device's own.
const TRANSPORT_FEATURES: Features = Features(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits());

/// `CONFIG` and `BACKEND_REQ`: without both, a change of the target would not
/// reach the guest. No `REPLY_ACK`: it would turn each config write of the guest
/// into a round trip.
///
/// `INFLIGHT_SHMFD`: what was under way outlives this process. `MQ`: without it QEMU
/// and crosvm believe in fewer queues than there are.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::CONFIG
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::MQ);

/// Bits of a `SET_VRING_KICK` payload that name the queue, and the one that
/// says that no file descriptor came.
const VRING_INDEX_MASK: u64 = 0xff;
const VRING_NO_FD: u64 = 1 << 8;

/// State of one connection.
pub(crate) struct Session<'a> {
    shared: &'a Shared,
    terms: Terms,
    epoll: Rc<OwnedFd>,
    vrings: Vec<Vring>,
    memory: Option<MemoryTable>,
    features: Features,
    channel: Option<OwnedFd>,
    stats_clock: StatsClock,
    /// What the device knows is about the driver that runs: it was seen to start,
    /// or found to go on.
    driver_known: bool,
    silence: Silence,
    busy_poll: BusyPoll,
}

impl<'a> Session<'a> {
    /// A connection on which nothing was said yet. Kicks are reported on
    /// `epoll` with the queue's number as data.
    pub(crate) fn new(
        shared: &'a Shared,
        terms: Terms,
        epoll: Rc<OwnedFd>,
    ) -> Result<Self, SessionError> {
        let vrings = (0..).take(QueueLayout::MAX_QUEUES).map(Vring::new);
        Ok(Self {
            shared,
            terms,
            epoll,
            vrings: vrings.collect::<Result<_, _>>()?,
            memory: None,
            features: Features::NONE,
            channel: None,
            stats_clock: StatsClock::default(),
            driver_known: false,
            silence: Silence::default(),
            busy_poll: BusyPoll::new(terms.busy_poll),
        })
    }

    /// Carries out one request and answers it where it has an answer.
    pub(crate) fn handle(
        &mut self,
        message: &mut Message,
        socket: impl AsFd,
    ) -> Result<(), SessionError> {
        let request = message.request;
        let unknown = SessionError::from(Violation::UnknownRequest { request });
        let Ok(code) = FrontendReq::try_from(request) else { return Err(unknown) };
        let answer = match code {
            FrontendReq::GET_FEATURES => self.get_features(),
            FrontendReq::GET_PROTOCOL_FEATURES => u64_bytes(PROTOCOL_FEATURES.bits()),
            FrontendReq::GET_QUEUE_NUM => u64_bytes(QueueLayout::MAX_QUEUES as u64),
            FrontendReq::GET_CONFIG => self.get_config(message)?,
            FrontendReq::GET_VRING_BASE => self.get_vring_base(message)?,
            FrontendReq::SET_OWNER => return Ok(()),
            FrontendReq::RESET_OWNER => {
                self.reset();
                return Ok(());
            }
            FrontendReq::SET_FEATURES => return self.set_features(message),
            FrontendReq::SET_PROTOCOL_FEATURES => return set_protocol_features(message),
            FrontendReq::SET_MEM_TABLE => return self.set_mem_table(message),
            FrontendReq::SET_VRING_NUM => return self.set_vring_num(message),
            FrontendReq::SET_VRING_ADDR => return self.set_vring_addr(message),
            FrontendReq::SET_VRING_BASE => return self.set_vring_base(message),
            FrontendReq::SET_VRING_KICK => return self.set_vring_kick(message),
            FrontendReq::SET_VRING_CALL => return self.set_vring_call(message),
            // Errors of a queue are counted and logged; the fd is of no use here.
            FrontendReq::SET_VRING_ERR => return Ok(()),
            FrontendReq::SET_VRING_ENABLE => return self.set_vring_enable(message),
            FrontendReq::SET_BACKEND_REQ_FD => return self.set_channel(message),
            FrontendReq::SET_CONFIG => return self.set_config(message),
            FrontendReq::GET_INFLIGHT_FD => return get_inflight(message, socket),
            FrontendReq::SET_INFLIGHT_FD => return self.set_inflight(message),
            _ => return Err(unknown),
        };
        wire::reply(socket, request, &answer).map_err(SessionError::Send)
    }

    /// Serves queue `index` after a kick.
    pub(crate) fn kicked(&mut self, index: usize) {
        if let Some(vring) = self.vrings.get(index) {
            vring.clear_kick();
            self.process(index);
        }
    }

    /// True while a queue has more than was served at once.
    pub(crate) fn has_more(&self) -> bool {
        self.vrings.iter().any(|vring| vring.more)
    }

    /// Serves once more each queue that was left with something.
    pub(crate) fn go_on(&mut self) {
        for index in 0..self.vrings.len() {
            if self.vrings[index].more {
                self.process(index);
            }
        }
    }

    /// True while a guest's next message is too near to sleep.
    pub(crate) fn polls_busily(&mut self) -> bool {
        self.busy_poll.goes_on(Instant::now())
    }

    /// Time until the guest is to be asked for statistics, if it is.
    pub(crate) fn until_stats(&self) -> Option<Duration> {
        self.stats_clock.left(self.shared.stats_interval(), Instant::now())
    }

    /// Time until the guest's size is to be assumed, if nobody says it.
    pub(crate) fn until_silence(&self) -> Option<Duration> {
        self.silence.left(Instant::now())
    }

    /// Assumes that the guest holds what it gave, where nobody says what it does.
    pub(crate) fn end_silence(&mut self) {
        if let Some(last_message) = self.silence.over_since(Instant::now()) {
            self.shared.assume_actual(last_message);
        }
    }

    /// Asks the guest for statistics where it is time to.
    pub(crate) fn ask_for_stats(&mut self) {
        let now = Instant::now();
        if !self.stats_clock.is_due(self.shared.stats_interval(), now) {
            return;
        }
        let Self { vrings, memory: Some(memory), shared, .. } = self else { return };
        let mut device = shared.device();
        let Some(index) = device.queues().index(Vq::Stats) else { return };
        let Some(vring) = vrings.get_mut(index).filter(|vring| vring.runs()) else { return };
        match device.request_stats(&memory.map, &mut vring.queue) {
            Ok(true) => vring.notify_guest(),
            Ok(false) => {}
            Err(error) => {
                vring.stop();
                device.forget_kept(Vq::Stats);
                if shared.may_log() {
                    tracing::warn!(%error, "queue stopped");
                }
            }
        }
    }

    /// Serves the request queue, where there is one: the operator asked for
    /// something, or time ran out.
    ///
    /// Not while the driver's queues stand still: where a front end cannot say
    /// that a driver is gone, the ring may be other memory by now. Only the
    /// driver itself, by a kick, has it looked at again.
    pub(crate) fn serve_requests(&mut self) {
        let device = self.shared.device();
        let stopped = device.requests().is_stopped();
        let index = device.queues().index(Vq::Request).filter(|_| !stopped);
        drop(device);
        if let Some(index) = index {
            self.process(index);
        }
    }

    /// Tells the guest that the configuration space changed.
    pub(crate) fn config_changed(&mut self) {
        self.busy_poll.allow();
        let Some(channel) = &self.channel else { return };
        if let Err(error) = wire::request(channel, BackendReq::CONFIG_CHANGE_MSG.into(), &[]) {
            self.shared.count_front_end_fault("channel_blocked");
            if self.shared.may_log() {
                tracing::warn!(%error, "front end: cannot tell of a configuration change");
            }
        }
    }

    /// Serves a queue once: a guest that never stops to add must not keep the
    /// loop from the socket, so what is left is for [`go_on`](Self::go_on). A ring
    /// that makes no sense is stopped; the other queues go on.
    fn process(&mut self, index: usize) {
        let Self { vrings, memory: Some(memory), shared, .. } = self else { return };
        let Some(vring) = vrings.get_mut(index) else { return };
        vring.more = false;
        if !vring.runs() {
            return;
        }
        if !vring.found && !find(shared, vring, index, &memory.map, &mut self.driver_known) {
            return;
        }
        let mut device = shared.device();
        let Some(vq) = device.queues().vq(index) else { return };
        let drained = device.process_queue(vq, &memory.map, &mut vring.queue);
        if drained.is_err() {
            device.forget_kept(vq);
        }
        drop(device);
        if matches!(vq, Vq::Inflate | Vq::Deflate) {
            let now = Instant::now();
            self.silence.changed(now);
            self.busy_poll.answered(now);
        }
        if matches!(vq, Vq::FreePage | Vq::Request) {
            shared.changed();
        }
        match drained {
            Ok(drained) => {
                vring.more = drained.more;
                if drained.notify {
                    vring.notify_guest();
                }
            }
            Err(error) => {
                vring.stop();
                // Of memory that is gone the session's end tells.
                if memory.map.lost_at().is_none() && shared.may_log() {
                    tracing::warn!(%error, "queue stopped");
                }
            }
        }
    }

    /// User Mode Linux asks this too when it has removed a driver, and where it
    /// cannot stop queues it says nothing else.
    fn get_features(&mut self) -> Vec<u8> {
        if !self.features.contains(TRANSPORT_FEATURES) {
            self.suspend();
        }
        u64_bytes(self.offered().0)
    }

    fn offered(&self) -> Features {
        self.shared.device().offered() | TRANSPORT_FEATURES
    }

    /// New features mean that a driver starts, unless the queues still run: then
    /// a front end only repeats itself. One without protocol features cannot stop
    /// queues, so from it every set of features is a start.
    ///
    /// After queues were stopped the same features may also mean that a paused
    /// guest goes on; the queues' bases tell.
    fn set_features(&mut self, message: &Message) -> Result<(), SessionError> {
        let features = Features(message.fields().u64()?);
        let excess = features.without(self.offered());
        if excess != Features::NONE {
            return Err(Violation::Features { features: excess.0 }.into());
        }
        let can_stop = self.features.contains(TRANSPORT_FEATURES);
        if can_stop && self.vrings.iter().any(Vring::runs) {
            let same = features == self.features;
            return if same { Ok(()) } else { Err(Violation::FeaturesWhileRunning.into()) };
        }
        self.vrings.iter_mut().for_each(Vring::reset);
        for vring in &mut self.vrings {
            vring.enabled = !features.contains(TRANSPORT_FEATURES);
        }
        let stopped = self.vrings.iter().any(|vring| vring.stopped_at.is_some());
        if stopped && features == self.features {
            self.suspend();
        } else {
            self.features = features;
            self.driver_starts();
        }
        Ok(())
    }

    fn set_mem_table(&mut self, message: &mut Message) -> Result<(), SessionError> {
        let memory = MemoryTable::from_message(message, self.terms.memory_bytes)?;
        if self.terms.sealed_only && !memory.is_sealed() {
            return Err(Violation::UnsealedMemory.into());
        }
        if !self.vrings.iter().all(|vring| vring.is_valid(&memory.map)) {
            return Err(Violation::MemoryTable.into());
        }
        let map = memory.host_map()?;
        let mut device = self.shared.device();
        device.reclaim_mut().set_memory(map);
        device.set_layout(memory.layout.clone());
        drop(device);
        self.memory = Some(memory);
        self.shared.changed();
        Ok(())
    }

    fn set_vring_num(&mut self, message: &Message) -> Result<(), SessionError> {
        let mut fields = message.fields();
        let (index, size) = (fields.u32()?, fields.u32()?);
        self.settle(index);
        self.vring(index)?.set_size(size)
    }

    fn set_vring_base(&mut self, message: &Message) -> Result<(), SessionError> {
        let mut fields = message.fields();
        let (index, base) = (fields.u32()?, fields.u32()?);
        self.settle(index);
        let vring = self.vring(index)?;
        vring.set_base(base)?;
        // A new driver begins at 0; where the ring stood there, nobody can tell,
        // and to forget what the guest holds is safe.
        if vring.stopped_at.take().is_some_and(|at| base == 0 || base != u32::from(at)) {
            self.driver_starts();
        }
        Ok(())
    }

    fn set_vring_addr(&mut self, message: &Message) -> Result<(), SessionError> {
        let mut fields = message.fields();
        let (index, _flags) = (fields.u32()?, fields.u32()?);
        let event_idx = self.features.contains(Features::RING_EVENT_IDX);
        let memory = self.memory.as_ref().ok_or(Violation::MemoryTable)?;
        let users = [fields.u64()?, fields.u64()?, fields.u64()?];
        let place = |i: usize| memory.guest_address(users[i]);
        let places = [place(0)?, place(1)?, place(2)?];
        // A front end says them once more where it changes the flags alone.
        if !self.vring(index)?.runs_at(places, event_idx) {
            self.settle(index);
            let Self { vrings, memory: Some(memory), .. } = self else { return Ok(()) };
            let vring = vrings.get_mut(index as usize).ok_or(Violation::NoSuchQueue { index })?;
            vring.set_addresses(places, &memory.map, event_idx)?;
        }
        self.process(index as usize);
        Ok(())
    }

    fn get_vring_base(&mut self, message: &Message) -> Result<Vec<u8>, SessionError> {
        let index = message.fields().u32()?;
        self.vring(index)?;
        self.suspend();
        let vring = self.vring(index)?;
        let base = vring.stop();
        vring.stopped_at = Some(base);
        let base = u32::from(base);
        Ok([index.to_ne_bytes(), base.to_ne_bytes()].concat())
    }

    fn set_vring_kick(&mut self, message: &mut Message) -> Result<(), SessionError> {
        let (index, fd) = vring_fd(message)?;
        let fd = fd.ok_or(Violation::NoKick { index })?;
        let epoll = Rc::clone(&self.epoll);
        self.vring(index)?.set_kick(fd, &epoll)?;
        self.process(index as usize);
        Ok(())
    }

    fn set_vring_call(&mut self, message: &mut Message) -> Result<(), SessionError> {
        let (index, fd) = vring_fd(message)?;
        self.vring(index)?.set_call(fd)
    }

    fn set_vring_enable(&mut self, message: &Message) -> Result<(), SessionError> {
        let mut fields = message.fields();
        let (index, enable) = (fields.u32()?, fields.u32()?);
        self.vring(index)?;
        if enable == 0 {
            self.suspend();
        }
        self.vring(index)?.enabled = enable != 0;
        self.process(index as usize);
        Ok(())
    }

    fn set_channel(&mut self, message: &mut Message) -> Result<(), SessionError> {
        self.channel = Some(one_fd(message)?);
        // A target that was set before the guest came is told once it listens.
        let config = self.shared.device().config();
        if config.num_pages != config.actual {
            self.config_changed();
        }
        Ok(())
    }

    /// Chains are noted in this memory from now on. It is said before the queues run.
    fn set_inflight(&mut self, message: &mut Message) -> Result<(), SessionError> {
        let description = inflight::Description::read(message)?;
        let region = Region::attach(description, one_fd(message)?)?;
        if self.vrings.iter().any(Vring::runs) {
            return Err(Violation::Inflight.into());
        }
        for index in (0..).take(self.vrings.len()) {
            // What these queues left behind is found by the notes, or was given back.
            self.settle(index);
        }
        for (index, vring) in self.vrings.iter_mut().enumerate() {
            vring.queue.set_notes(region.part(index));
            vring.found = false;
        }
        Ok(())
    }

    /// The front end took memory away: the guest's, or that which chains are noted in.
    pub(crate) fn check(&self) -> Result<(), SessionError> {
        if let Some(lost) = self.memory.as_ref().and_then(|memory| memory.map.lost_at()) {
            return Err(SessionError::Unbacked { address: lost.0 });
        }
        let lost = self.vrings.iter().any(|vring| vring.queue.is_lost());
        if lost { Err(Violation::Inflight.into()) } else { Ok(()) }
    }

    fn reset(&mut self) {
        self.vrings.iter_mut().for_each(Vring::reset);
        self.features = Features::NONE;
        self.driver_starts();
    }

    /// The queues stop, or one of them does. The device keeps chains no longer;
    /// those of a queue that goes on come back with the driver's next kick.
    fn suspend(&mut self) {
        for index in (0..).take(self.vrings.len()) {
            self.settle(index);
        }
        self.shared.device().suspend();
        self.shared.changed();
    }

    /// A queue stops, or is set up anew: the device keeps no chain of it any longer.
    ///
    /// Where it runs, its driver gets them back, so that nothing of it is under way and
    /// where it stands can be read from its ring. To keep them beside what is read there
    /// would be to return them twice. Where it does not, its memory may be anything by now.
    fn settle(&mut self, index: u32) {
        let Self { vrings, memory, shared, .. } = self;
        let index = index as usize;
        let mut device = shared.device();
        let (Some(vring), Some(vq)) = (vrings.get_mut(index), device.queues().vq(index)) else {
            return;
        };
        if let Some(memory) = memory
            && vring.runs()
        {
            match device.return_unused(vq, &memory.map, &mut vring.queue) {
                Ok(true) => vring.notify_guest(),
                Ok(false) => {}
                Err(error) => {
                    vring.stop();
                    if shared.may_log() {
                        tracing::warn!(%error, "queue stopped");
                    }
                }
            }
        }
        device.forget_kept(vq);
    }

    /// Whatever the guest held is its own again.
    fn driver_starts(&mut self) {
        for vring in &mut self.vrings {
            vring.stopped_at = None;
        }
        self.driver_known = false;
        self.shared.reset(self.features.without(TRANSPORT_FEATURES));
        self.shared.changed();
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring, SessionError> {
        Ok(self.vrings.get_mut(index as usize).ok_or(Violation::NoSuchQueue { index })?)
    }
}

impl Drop for Session<'_> {
    /// The guest is gone with its monitor: nothing of it may be released any
    /// more, since its memory may be mapped by a monitor that comes back.
    fn drop(&mut self) {
        let mut device = self.shared.device();
        device.requests_mut().end_all(RequestFailure::HungUp);
        // First: nothing is reserved for a guest that is gone.
        device.reclaim_mut().forget_memory();
        device.reset(Features::NONE);
        device.set_layout(balloon_device::MemoryLayout::default());
        drop(device);
        self.shared.changed();
    }
}

fn get_inflight(message: &Message, socket: impl AsFd) -> Result<(), SessionError> {
    let region = Region::create(inflight::Description::read(message)?)?;
    let answer = region.description().to_bytes();
    wire::reply_with(socket, message.request, &answer, region.file()).map_err(SessionError::Send)
}

fn set_protocol_features(message: &Message) -> Result<(), SessionError> {
    let excess = message.fields().u64()? & !PROTOCOL_FEATURES.bits();
    if excess == 0 { Ok(()) } else { Err(Violation::Features { features: excess }.into()) }
}

fn u64_bytes(value: u64) -> Vec<u8> {
    value.to_ne_bytes().to_vec()
}

fn one_fd(message: &mut Message) -> Result<OwnedFd, SessionError> {
    let count = message.fds.len();
    match message.fds.pop() {
        Some(fd) if count == 1 => Ok(fd),
        _ => Err(Violation::FdCount { request: message.request, count }.into()),
    }
}

fn vring_fd(message: &mut Message) -> Result<(u32, Option<OwnedFd>), SessionError> {
    let value = message.fields().u64()?;
    let index = u32::try_from(value & VRING_INDEX_MASK).unwrap_or(u32::MAX);
    if value & VRING_NO_FD != 0 {
        return Ok((index, None));
    }
    Ok((index, Some(one_fd(message)?)))
}
