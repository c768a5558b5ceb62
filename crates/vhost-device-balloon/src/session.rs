//! One front end's session. Its requests may arrive in any order.

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
use crate::config_write_fallback::ConfigWriteFallback;
use crate::error::{SessionError, Violation};
use crate::inflight::{self, Region};
use crate::limits::SessionLimits;
use crate::memory::MemoryTable;
use crate::vring::Vring;
use crate::vring_recovery::recover;
use crate::wire::{self, Message};

/// Features in addition to the device's.
const TRANSPORT_FEATURES: Features = Features(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits());

/// `CONFIG` and `BACKEND_REQ`: without both, a change of the target would not
/// reach the guest. No `REPLY_ACK`: it would turn each config write of the guest
/// into a round trip.
///
/// `INFLIGHT_SHMFD`: the list of chains in flight outlives this process. `MQ`: without it QEMU
/// and crosvm assume fewer queues.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::CONFIG
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::MQ);

/// Bits of a `SET_VRING_KICK` or `SET_VRING_CALL` payload: the queue's index, and the flag for a missing file
/// descriptor.
const VRING_INDEX_MASK: u64 = 0xff;
const VRING_NO_FD: u64 = 1 << 8;

/// State of one connection.
pub(crate) struct Session<'a> {
    shared: &'a Shared,
    limits: SessionLimits,
    epoll: Rc<OwnedFd>,
    vrings: Vec<Vring>,
    memory: Option<MemoryTable>,
    features: Features,
    channel: Option<OwnedFd>,
    stats_clock: StatsClock,
    /// The device's state belongs to the running driver: the back end saw it start or resumed
    /// it.
    driver_known: bool,
    config_fallback: ConfigWriteFallback,
    busy_poll: BusyPoll,
}

impl<'a> Session<'a> {
    /// Starts a session. Kicks are reported on `epoll` with the queue's index as data.
    pub(crate) fn new(
        shared: &'a Shared,
        limits: SessionLimits,
        epoll: Rc<OwnedFd>,
    ) -> Result<Self, SessionError> {
        let vrings = (0..).take(QueueLayout::MAX_QUEUES).map(Vring::new);
        Ok(Self {
            shared,
            limits,
            epoll,
            vrings: vrings.collect::<Result<_, _>>()?,
            memory: None,
            features: Features::NONE,
            channel: None,
            stats_clock: StatsClock::default(),
            driver_known: false,
            config_fallback: ConfigWriteFallback::default(),
            busy_poll: BusyPoll::new(limits.busy_poll),
        })
    }

    /// Handles one request and sends its reply, if it has one.
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
            // Queue errors are counted and logged; the fd is not used.
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

    /// Returns true while a queue has chains left after a bounded drain.
    pub(crate) fn has_more(&self) -> bool {
        self.vrings.iter().any(|vring| vring.more)
    }

    /// Serves the queues with chains left again.
    pub(crate) fn serve_remaining(&mut self) {
        for index in 0..self.vrings.len() {
            if self.vrings[index].more {
                self.process(index);
            }
        }
    }

    /// Returns true while the thread should poll for the guest's next message.
    pub(crate) fn polls_busily(&mut self) -> bool {
        self.busy_poll.is_active(Instant::now())
    }

    /// Returns the time until the next statistics request, if there is one.
    pub(crate) fn until_stats(&self) -> Option<Duration> {
        self.stats_clock.left(self.shared.stats_interval(), Instant::now())
    }

    /// Returns the time until the config-write fallback, if it is pending.
    pub(crate) fn until_config_fallback(&self) -> Option<Duration> {
        self.config_fallback.left(Instant::now())
    }

    /// Sets `actual` to the pages in the balloon if the front end sent no config write in time.
    pub(crate) fn apply_config_fallback(&mut self) {
        if let Some(last_message) = self.config_fallback.take_expired(Instant::now()) {
            self.shared.assume_actual(last_message);
        }
    }

    /// Requests statistics from the guest if they are due.
    pub(crate) fn request_stats(&mut self) {
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
                device.forget_pending(Vq::Stats);
                if shared.may_log() {
                    tracing::warn!(%error, "queue stopped");
                }
            }
        }
    }

    /// Serves the request queue, if there is one, after an operator's request or a timeout.
    ///
    /// Does nothing while the driver's queues are stopped: some front ends do not report that a
    /// driver is gone, so the vring's memory may have another use. Only a kick of the driver
    /// resumes the queue.
    pub(crate) fn serve_requests(&mut self) {
        let device = self.shared.device();
        let stopped = device.requests().is_stopped();
        let index = device.queues().index(Vq::Request).filter(|_| !stopped);
        drop(device);
        if let Some(index) = index {
            self.process(index);
        }
    }

    /// Sends the guest a configuration change notification.
    pub(crate) fn config_changed(&mut self) {
        self.busy_poll.allow();
        let Some(channel) = &self.channel else { return };
        if let Err(error) = wire::request(channel, BackendReq::CONFIG_CHANGE_MSG.into(), &[]) {
            self.shared.count_front_end_fault("channel_blocked");
            if self.shared.may_log() {
                tracing::warn!(%error, "front end: cannot send a configuration change notification");
            }
        }
    }

    /// Serves a queue once, for a bounded time: a guest that keeps adding chains must not block the
    /// loop. [`serve_remaining`](Self::serve_remaining) serves the rest. Stops a queue with an
    /// invalid vring; the other queues run on.
    fn process(&mut self, index: usize) {
        let Self { vrings, memory: Some(memory), shared, .. } = self else { return };
        let Some(vring) = vrings.get_mut(index) else { return };
        vring.more = false;
        if !vring.runs() {
            return;
        }
        if !vring.recovered && !recover(shared, vring, index, &memory.map, &mut self.driver_known) {
            return;
        }
        let mut device = shared.device();
        let Some(vq) = device.queues().vq(index) else { return };
        let drained = device.process_queue(vq, &memory.map, &mut vring.queue);
        if drained.is_err() {
            device.forget_pending(vq);
        }
        drop(device);
        if matches!(vq, Vq::Inflate | Vq::Deflate) {
            let now = Instant::now();
            self.config_fallback.message_served(now);
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
                // Lost memory is reported when the session ends.
                if memory.map.lost_at().is_none() && shared.may_log() {
                    tracing::warn!(%error, "queue stopped");
                }
            }
        }
    }

    /// Handles `GET_FEATURES`. User Mode Linux also sends it after it has removed a driver; without
    /// protocol features, in which case it cannot stop queues, this is the only sign.
    fn get_features(&mut self) -> Vec<u8> {
        if !self.features.contains(TRANSPORT_FEATURES) {
            self.suspend();
        }
        u64_bytes(self.offered().0)
    }

    fn offered(&self) -> Features {
        self.shared.device().offered() | TRANSPORT_FEATURES
    }

    /// Handles `SET_FEATURES`: a driver starts, unless the queues still run, in which case the
    /// front end only repeats the features. A front end without protocol features cannot stop
    /// queues, so each of its requests is a start.
    ///
    /// After the queues were stopped, the same features may also mean that a paused guest resumes;
    /// the queues' bases distinguish the two.
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
        let memory = MemoryTable::from_message(message, self.limits.memory_bytes)?;
        if self.limits.sealed_only && !memory.is_sealed() {
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
        self.return_pending(index);
        self.vring(index)?.set_size(size)
    }

    fn set_vring_base(&mut self, message: &Message) -> Result<(), SessionError> {
        let mut fields = message.fields();
        let (index, base) = (fields.u32()?, fields.u32()?);
        self.return_pending(index);
        let vring = self.vring(index)?;
        vring.set_base(base)?;
        // A new driver starts at 0. If the queue was stopped at 0 the two cases look the same, and
        // to forget the balloon is safe.
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
        // A front end repeats the addresses if it changes only the flags.
        if !self.vring(index)?.runs_at(places, event_idx) {
            self.return_pending(index);
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
        // Report a target that was set before the guest connected.
        let config = self.shared.device().config();
        if config.num_pages != config.actual {
            self.config_changed();
        }
        Ok(())
    }

    /// Handles `SET_INFLIGHT_FD`, which must precede the start of the queues. Chains in flight are
    /// recorded in this region from now on.
    fn set_inflight(&mut self, message: &mut Message) -> Result<(), SessionError> {
        let description = inflight::Description::read(message)?;
        let region = Region::attach(description, one_fd(message)?)?;
        if self.vrings.iter().any(Vring::runs) {
            return Err(Violation::Inflight.into());
        }
        for index in (0..).take(self.vrings.len()) {
            // Pending chains are in the inflight region, or are returned here.
            self.return_pending(index);
        }
        for (index, vring) in self.vrings.iter_mut().enumerate() {
            vring.queue.set_region(region.part(index));
            vring.recovered = false;
        }
        Ok(())
    }

    /// Returns an error if guest memory or the inflight region became inaccessible.
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

    /// Handles the stop of one or more queues. Returns pending chains of all queues; a queue that
    /// runs on gets them again with the driver's next kick.
    fn suspend(&mut self) {
        for index in (0..).take(self.vrings.len()) {
            self.return_pending(index);
        }
        self.shared.device().suspend();
        self.shared.changed();
    }

    /// Returns or drops the pending chains of a queue that stops or is set up again.
    ///
    /// If the queue runs, they are returned to the driver. Then no chain is in flight, and the
    /// vring itself has the queue's position. Chains kept beyond that would be returned twice. If
    /// the queue does not run, the vring's memory may have another use, and they are dropped.
    fn return_pending(&mut self, index: u32) {
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
        device.forget_pending(vq);
    }

    /// Handles the start of a driver: the balloon is empty.
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
    /// The guest is gone with its front end. None of its memory may be released from now on,
    /// because a front end that reconnects may map it again.
    fn drop(&mut self) {
        let mut device = self.shared.device();
        device.requests_mut().end_all(RequestFailure::HungUp);
        // First, so that the reset reserves no memory for a guest that is gone.
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
