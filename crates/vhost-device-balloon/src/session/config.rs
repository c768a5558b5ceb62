//! The front end's reads and writes of the configuration space for its guest.

use std::time::Instant;

use balloon_abi::Features;
use balloon_abi::config::{CONFIG_BYTES, Field};

use super::Session;
use crate::error::{SessionError, Violation};
use crate::wire::Message;

/// Most bytes of configuration space that may be read; those beyond the balloon's read as zero.
/// The protocol's reference front end (QEMU) reads at most this.
const MAX_CONFIG_BYTES: usize = 256;

/// Bytes of a field of the configuration space.
const FIELD_BYTES: usize = 4;

impl Session<'_> {
    pub(super) fn get_config(&mut self, message: &Message) -> Result<Vec<u8>, SessionError> {
        let mut fields = message.fields();
        let (offset, size, flags) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let (from, len) = (offset as usize, size as usize);
        if from.saturating_add(len) > MAX_CONFIG_BYTES {
            return Err(Violation::PayloadSize { request: message.request, size: len }.into());
        }
        let mut space = [0; MAX_CONFIG_BYTES];
        space[..CONFIG_BYTES]
            .copy_from_slice(&self.shared.device().read_config(Instant::now()).to_bytes());
        let mut answer = Vec::with_capacity(12 + len);
        for word in [offset, size, flags] {
            answer.extend(word.to_ne_bytes());
        }
        answer.extend(&space[from..from + len]);
        Ok(answer)
    }

    /// Handles `SET_CONFIG`. An invalid write is counted and ignored: it is the guest's fault, not
    /// the front end's.
    ///
    /// QEMU writes the whole space for any write of the guest, with its own values for the other
    /// fields. Then only the driver's fields are used.
    pub(super) fn set_config(&mut self, message: &Message) -> Result<(), SessionError> {
        let mut fields = message.fields();
        let (offset, size, _flags) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let data = fields.bytes(size as usize)?;
        self.config_fallback.config_written();
        self.shared.save_poison(offset, data);
        let mut device = self.shared.device();
        let poisons = device.negotiated().contains(Features::PAGE_POISON);
        let valid = |field| field != Field::PoisonVal || poisons;
        let mut write = |offset, data| {
            if let Err(fault) = device.write_config(offset, data, Instant::now()) {
                tracing::debug!(%fault, offset, "config write refused");
            }
        };
        if offset == 0 && data.len() > FIELD_BYTES && data.len().is_multiple_of(FIELD_BYTES) {
            for (place, data) in (0..).step_by(FIELD_BYTES).zip(data.chunks(FIELD_BYTES)) {
                let field = Field::ALL.into_iter().find(|field| field.offset() == place as usize);
                if field.is_some_and(|field| field.is_driver_writable() && valid(field)) {
                    write(place, data);
                }
            }
        } else {
            write(offset, data);
        }
        drop(device);
        if self.driver_known {
            self.shared.save_actual();
        }
        self.shared.changed();
        Ok(())
    }
}
