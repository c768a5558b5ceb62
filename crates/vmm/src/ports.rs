//! Port I/O: the serial port, the ACPI power registers, the panic device.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::output::{LostOutput, Output, OutputEnd};
use crate::state::PortsState;

/// First port of COM1, and the number of its ports.
pub(crate) const SERIAL: u16 = 0x3f8;
pub(crate) const SERIAL_PORTS: u8 = 8;

/// ACPI power registers (ACPI 6.5, 4.8.3.7 and 4.8.3.6).
pub(crate) const SLEEP_CONTROL: u16 = 0x600;
pub(crate) const SLEEP_STATUS: u16 = 0x601;
pub(crate) const RESET: u16 = 0x602;

/// Values that the guest writes there.
pub(crate) const RESET_VALUE: u8 = 1;
pub(crate) const SLEEP_TYPE_OFF: u8 = 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
const SLEEP_ENABLE: u8 = 1 << 5;

/// pvpanic's port and bit (QEMU, `docs/specs/pvpanic.rst`).
pub(crate) const PANIC: u16 = 0x505;
const PANICKED: u8 = 1;

/// The PC's keyboard controller, through which a kernel without ACPI requests a reset.
const KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

/// How often to check whether the serial port accepts input again: the end of the driver's loopback
/// test raises no event.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The value of a port without a device.
const NO_DEVICE: u8 = 0xff;

/// A power request of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    PowerOff,
    Reset,
}

/// The interrupt of the serial port.
pub(crate) struct SerialInterrupt(pub(crate) EventFd);

impl Trigger for SerialInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Wakes threads that wait for space in the serial port's buffer.
pub(crate) struct SpaceEvents(Arc<Condvar>);

impl SerialEvents for SpaceEvents {
    fn buffer_read(&self) {
        self.0.notify_all();
    }
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.notify_all();
    }
}

type SerialLine = Serial<SerialInterrupt, SpaceEvents, Output>;

/// All ports of a guest.
pub(crate) struct Ports {
    serial: Mutex<SerialLine>,
    output: OutputEnd,
    interrupt: EventFd,
    space: Arc<Condvar>,
    panicked: Mutex<bool>,
}

impl Ports {
    /// The serial port writes to `output`.
    pub(crate) fn new(interrupt: EventFd, output: Box<dyn Write + Send>) -> io::Result<Self> {
        let interrupt_copy = interrupt.try_clone()?;
        let output = Output::start(output)?;
        let space = Arc::new(Condvar::new());
        let events = SpaceEvents(Arc::clone(&space));
        let serial = Serial::with_events(SerialInterrupt(interrupt), events, output.input());
        Ok(Self {
            serial: Mutex::new(serial),
            output,
            interrupt: interrupt_copy,
            space,
            panicked: Mutex::new(false),
        })
    }

    /// Serves a write by the guest. Unknown ports and values are ignored.
    pub(crate) fn write(&self, port: u16, data: &[u8]) -> Option<Request> {
        let [value] = *data else { return None };
        if let Some(offset) = serial_offset(port) {
            if let Err(error) = self.serial().write(offset, value) {
                tracing::debug!(%error, "serial port");
            }
            return None;
        }
        match port {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 => {
                let kind = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
                (kind == SLEEP_TYPE_OFF).then_some(Request::PowerOff)
            }
            RESET if value == RESET_VALUE => Some(Request::Reset),
            KEYBOARD_COMMAND if value == KEYBOARD_RESET => Some(Request::Reset),
            PANIC if value & PANICKED != 0 => {
                *self.panicked.lock().unwrap_or_else(PoisonError::into_inner) = true;
                None
            }
            _ => None,
        }
    }

    /// Serves a read by the guest.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(NO_DEVICE);
        let [value] = data else { return };
        if let Some(offset) = serial_offset(port) {
            *value = self.serial().read(offset);
            return;
        }
        match port {
            SLEEP_CONTROL | SLEEP_STATUS | RESET | KEYBOARD_COMMAND => *value = 0,
            PANIC => *value = PANICKED,
            _ => {}
        }
    }

    /// True once the guest's kernel has reported a panic.
    pub(crate) fn panicked(&self) -> bool {
        *self.panicked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ports' state, for a paused guest.
    pub(crate) fn state(&self) -> PortsState {
        PortsState { serial: self.serial().state(), panicked: self.panicked() }
    }

    /// Restores the ports' state, and raises a pending interrupt again.
    pub(crate) fn restore(&self, state: &PortsState) -> io::Result<()> {
        let mut serial = self.serial();
        let interrupt = SerialInterrupt(self.interrupt.try_clone()?);
        let events = SpaceEvents(Arc::clone(&self.space));
        *serial = Serial::from_state(&state.serial, interrupt, events, self.output.input())
            .map_err(|error| io::Error::other(error.to_string()))?;
        *self.panicked.lock().unwrap_or_else(PoisonError::into_inner) = state.panicked;
        Ok(())
    }

    /// Waits until the reader has received the guest's output, at most `limit`.
    pub(crate) fn finish_output(&self, limit: Duration) -> LostOutput {
        self.output.finish(limit)
    }

    /// Sends bytes to the guest through the serial port; waits while its buffer is full. If the
    /// guest takes none for `timeout`, drops the rest.
    pub(crate) fn type_in(&self, mut bytes: &[u8], timeout: Option<Duration>) -> io::Result<()> {
        let mut serial = self.serial();
        let mut took = Instant::now();
        while !bytes.is_empty() {
            let space = serial.fifo_capacity().min(bytes.len());
            // The port also accepts no input while its driver tests it in loopback mode.
            let taken = match space {
                0 => 0,
                _ => serial.enqueue_raw_bytes(&bytes[..space]).map_err(io::Error::other)?,
            };
            bytes = &bytes[taken..];
            if taken > 0 {
                took = Instant::now();
            } else if timeout.is_some_and(|timeout| took.elapsed() >= timeout) {
                tracing::debug!(bytes = bytes.len(), "guest: it takes no input; dropped");
                return Ok(());
            } else {
                let waited = self.space.wait_timeout(serial, POLL_INTERVAL);
                serial = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        Ok(())
    }

    fn serial(&self) -> MutexGuard<'_, SerialLine> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn serial_offset(port: u16) -> Option<u8> {
    let offset = u8::try_from(port.checked_sub(SERIAL)?).ok()?;
    (offset < SERIAL_PORTS).then_some(offset)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One of each kind, and the ports beside them.
    const ALL_PORTS: &[u16] = &[
        SERIAL,
        SERIAL + 7,
        SERIAL + 8,
        SLEEP_CONTROL,
        SLEEP_STATUS,
        RESET,
        RESET + 1,
        PANIC,
        PANIC + 1,
        KEYBOARD_COMMAND,
        KEYBOARD_COMMAND + 1,
    ];

    fn ports() -> Ports {
        Ports::new(EventFd::new(0).unwrap(), Box::new(io::sink())).unwrap()
    }

    #[test]
    fn only_exact_values_in_the_power_registers_end_the_guest() {
        let ports = ports();
        let off = SLEEP_ENABLE | SLEEP_TYPE_OFF << SLEEP_TYPE_SHIFT;
        assert_eq!(ports.write(SLEEP_CONTROL, &[off]), Some(Request::PowerOff));
        assert_eq!(ports.write(SLEEP_CONTROL, &[off & !SLEEP_ENABLE]), None);
        assert_eq!(ports.write(SLEEP_CONTROL, &[SLEEP_ENABLE | 1 << SLEEP_TYPE_SHIFT]), None);
        assert_eq!(ports.write(RESET, &[RESET_VALUE]), Some(Request::Reset));
        assert_eq!(ports.write(KEYBOARD_COMMAND, &[KEYBOARD_RESET]), Some(Request::Reset));
        assert_eq!(ports.write(RESET, &[RESET_VALUE, 0]), None);
    }

    #[test]
    fn a_panic_is_recorded() {
        let ports = ports();
        assert_eq!(ports.write(PANIC, &[2]), None);
        assert!(!ports.panicked());
        assert_eq!(ports.write(PANIC, &[PANICKED]), None);
        assert!(ports.panicked());
        let mut value = [0];
        ports.read(PANIC, &mut value);
        assert_eq!(value, [PANICKED]);
    }

    #[test]
    fn input_that_exceeds_the_buffer_waits_for_the_guest() {
        let ports = ports();
        let text = [b'x'; 200];
        std::thread::scope(|scope| {
            let typing = scope.spawn(|| ports.type_in(&text, None));
            let mut seen = 0;
            while seen < text.len() {
                let mut status = [0];
                ports.read(SERIAL + 5, &mut status);
                if status[0] & 1 != 0 {
                    ports.read(SERIAL, &mut status);
                    assert_eq!(status[0], b'x');
                    seen += 1;
                }
            }
            typing.join().unwrap().unwrap();
        });
    }

    #[test]
    fn type_in_drops_input_after_the_timeout() {
        let ports = ports();
        ports.type_in(&[b'x'; 200], Some(POLL_INTERVAL)).unwrap();
        // The lock is free, and the buffer has the first bytes.
        let mut value = [0];
        ports.read(SERIAL, &mut value);
        assert_eq!(value, [b'x']);
    }

    proptest! {
        #[test]
        fn only_known_ports_act(
            port in prop_oneof![any::<u16>(), prop::sample::select(ALL_PORTS)],
            data in prop::collection::vec(any::<u8>(), 0..9),
        ) {
            let ports = ports();
            let ends = [SLEEP_CONTROL, RESET, KEYBOARD_COMMAND];
            let request = ports.write(port, &data);
            prop_assert!(request.is_none() || (ends.contains(&port) && data.len() == 1));
            prop_assert!(!ports.panicked() || (port == PANIC && data.len() == 1));
            let known = serial_offset(port).is_some()
                || [SLEEP_CONTROL, SLEEP_STATUS, RESET, KEYBOARD_COMMAND, PANIC].contains(&port);
            let mut read = data;
            ports.read(port, &mut read);
            prop_assert!((known && read.len() == 1) || read.iter().all(|byte| *byte == NO_DEVICE));
        }
    }
}
