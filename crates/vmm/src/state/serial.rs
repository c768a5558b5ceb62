//! The state of the ports: the serial port, and whether the kernel has reported a panic.

use vm_superio::serial::SerialState;

use crate::codec::{Malformed, Reader, Writer};

/// Maximum bytes in the receive buffer (four times a 16550A's, as in `vm-superio`).
const MAX_BUFFER_BYTES: usize = 64;

/// The ports of a paused guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PortsState {
    pub(crate) serial: SerialState,
    pub(crate) panicked: bool,
}

impl PortsState {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let line = &self.serial;
        let mut writer = Writer::default();
        writer.u8(line.baud_divisor_low).u8(line.baud_divisor_high).u8(line.interrupt_enable);
        writer.u8(line.interrupt_identification).u8(line.line_control).u8(line.line_status);
        writer.u8(line.modem_control).u8(line.modem_status).u8(line.scratch);
        writer.list(&line.in_buffer).flag(self.panicked);
        writer.finish()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let serial = SerialState {
            baud_divisor_low: reader.u8()?,
            baud_divisor_high: reader.u8()?,
            interrupt_enable: reader.u8()?,
            interrupt_identification: reader.u8()?,
            line_control: reader.u8()?,
            line_status: reader.u8()?,
            modem_control: reader.u8()?,
            modem_status: reader.u8()?,
            scratch: reader.u8()?,
            in_buffer: reader.list("bytes of the serial port", MAX_BUFFER_BYTES)?,
        };
        let panicked = reader.flag("a panic")?;
        reader.finish()?;
        Ok(Self { serial, panicked })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_port_round_trips_and_a_longer_buffer_is_refused() {
        let serial = SerialState { scratch: 7, in_buffer: vec![b'x'; 64], ..Default::default() };
        let state = PortsState { serial, panicked: true };
        let bytes = state.encode();
        assert_eq!(PortsState::decode(&bytes), Ok(state.clone()));
        assert!(PortsState::decode(&bytes[..bytes.len() - 1]).is_err());
        let mut longer = state;
        longer.serial.in_buffer.push(b'x');
        assert!(matches!(PortsState::decode(&longer.encode()), Err(Malformed::TooMany { .. })));
    }
}
