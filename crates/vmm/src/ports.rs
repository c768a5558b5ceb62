//! Port I/O: the serial line, the power registers of the ACPI tables, the panic event.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::console::output::{Lost, Output, OutputEnd};
use crate::state::PortsState;

/// First port of the PC's first serial line, and how many it has.
pub(crate) const SERIAL: u16 = 0x3f8;
pub(crate) const SERIAL_PORTS: u8 = 8;

/// Registers of the ACPI tables (ACPI 6.5, 4.8.3.7 and 4.8.3.6).
pub(crate) const SLEEP_CONTROL: u16 = 0x600;
pub(crate) const SLEEP_STATUS: u16 = 0x601;
pub(crate) const RESET: u16 = 0x602;

/// What the guest writes there.
pub(crate) const RESET_VALUE: u8 = 1;
pub(crate) const SLEEP_TYPE_OFF: u8 = 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
const SLEEP_ENABLE: u8 = 1 << 5;

/// Where a Linux kernel says that it has panicked, and how (QEMU, `docs/specs/pvpanic.rst`).
pub(crate) const PANIC: u16 = 0x505;
const PANICKED: u8 = 1;

/// The PC's keyboard controller, which a kernel without ACPI asks for a reset.
const KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

/// How often it is looked whether the serial line takes something again: the end of a test of its
/// driver's is not announced.
const ROOM_LOOK: Duration = Duration::from_millis(10);

/// What nobody answers reads as.
const NOBODY: u8 = 0xff;

/// What the guest asks for by a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    PowerOff,
    Reset,
}

/// The interrupt of the serial line.
pub(crate) struct SerialInterrupt(pub(crate) EventFd);

impl Trigger for SerialInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Wakes who waits for room in the serial line's buffer.
pub(crate) struct RoomEvents(Arc<Condvar>);

impl SerialEvents for RoomEvents {
    fn buffer_read(&self) {
        self.0.notify_all();
    }
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.notify_all();
    }
}

type SerialLine = Serial<SerialInterrupt, RoomEvents, Output>;

/// All ports of a guest.
pub(crate) struct Ports {
    serial: Mutex<SerialLine>,
    output: OutputEnd,
    interrupt: EventFd,
    room: Arc<Condvar>,
    panicked: Mutex<bool>,
}

impl Ports {
    /// The serial line writes to `output`.
    pub(crate) fn new(interrupt: EventFd, output: Box<dyn Write + Send>) -> io::Result<Self> {
        let interrupt_copy = interrupt.try_clone()?;
        let output = Output::start(output)?;
        let room = Arc::new(Condvar::new());
        let events = RoomEvents(Arc::clone(&room));
        let serial = Serial::with_events(SerialInterrupt(interrupt), events, output.input());
        Ok(Self {
            serial: Mutex::new(serial),
            output,
            interrupt: interrupt_copy,
            room,
            panicked: Mutex::new(false),
        })
    }

    /// The guest writes; whatever it writes wherever, it harms only itself.
    pub(crate) fn write(&self, port: u16, data: &[u8]) -> Option<Request> {
        let [value] = *data else { return None };
        if let Some(offset) = serial_offset(port) {
            if let Err(error) = self.serial().write(offset, value) {
                tracing::debug!(%error, "serial line");
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

    /// The guest reads.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(NOBODY);
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

    /// True once the guest's kernel has said that it panicked.
    pub(crate) fn panicked(&self) -> bool {
        *self.panicked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of a guest that stands still.
    pub(crate) fn state(&self) -> PortsState {
        PortsState { serial: self.serial().state(), panicked: self.panicked() }
    }

    /// Goes on with the ports of another host's guest, and interrupts the guest where it has to
    /// hear of what was going on.
    pub(crate) fn restore(&self, state: &PortsState) -> io::Result<()> {
        let mut serial = self.serial();
        let interrupt = SerialInterrupt(self.interrupt.try_clone()?);
        let events = RoomEvents(Arc::clone(&self.room));
        *serial = Serial::from_state(&state.serial, interrupt, events, self.output.input())
            .map_err(|error| io::Error::other(error.to_string()))?;
        *self.panicked.lock().unwrap_or_else(PoisonError::into_inner) = state.panicked;
        Ok(())
    }

    /// Waits until what the guest has written is with its reader, at most so long.
    pub(crate) fn finish_output(&self, limit: Duration) -> Lost {
        self.output.finish(limit)
    }

    /// Sends bytes to the guest by the serial line, and waits while it has no room for them. Where
    /// the guest takes none for `patience`, if there is one, the rest is dropped.
    pub(crate) fn type_in(&self, mut bytes: &[u8], patience: Option<Duration>) -> io::Result<()> {
        let mut serial = self.serial();
        let mut took = Instant::now();
        while !bytes.is_empty() {
            let room = serial.fifo_capacity().min(bytes.len());
            // The line takes nothing either while its driver tests it with its output as input.
            let taken = match room {
                0 => 0,
                _ => serial.enqueue_raw_bytes(&bytes[..room]).map_err(io::Error::other)?,
            };
            bytes = &bytes[taken..];
            if taken > 0 {
                took = Instant::now();
            } else if patience.is_some_and(|patience| took.elapsed() >= patience) {
                tracing::debug!(bytes = bytes.len(), "guest: it takes no input, which is dropped");
                return Ok(());
            } else {
                let waited = self.room.wait_timeout(serial, ROOM_LOOK);
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

    fn ports() -> Ports {
        Ports::new(EventFd::new(0).unwrap(), Box::new(io::sink())).unwrap()
    }

    #[test]
    fn a_guest_ends_by_the_registers_of_its_tables_and_by_nothing_near_them() {
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
    fn a_panic_is_noted() {
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
    fn more_than_the_line_has_room_for_waits_for_the_guest() {
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
    fn a_guest_that_takes_no_input_keeps_nobody_for_longer_than_he_waits() {
        let ports = ports();
        ports.type_in(&[b'x'; 200], Some(ROOM_LOOK)).unwrap();
        // The line is free meanwhile, and has what there was room for.
        let mut value = [0];
        ports.read(SERIAL, &mut value);
        assert_eq!(value, [b'x']);
    }

    proptest! {
        #[test]
        fn no_access_does_harm(port: u16, data in prop::collection::vec(any::<u8>(), 0..9)) {
            let ports = ports();
            ports.write(port, &data);
            let mut data = data;
            ports.read(port, &mut data);
        }
    }
}
