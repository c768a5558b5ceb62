//! The configuration space (virtio 1.3, section 5.5.4): four little-endian
//! `u32` fields.

/// Bytes of the whole configuration space.
pub const CONFIG_BYTES: usize = 16;

/// A field of the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// The balloon's target, in balloon pages. Read-only for the driver.
    NumPages,
    /// Balloon pages in the balloon, as the driver reports.
    Actual,
    /// Command id of free page hinting. Read-only for the driver.
    FreePageHintCmdId,
    /// The pattern with which the guest fills free pages.
    PoisonVal,
}

impl Field {
    /// All fields, in wire order.
    pub const ALL: [Self; 4] =
        [Self::NumPages, Self::Actual, Self::FreePageHintCmdId, Self::PoisonVal];

    /// Byte offset of the field.
    pub const fn offset(self) -> usize {
        match self {
            Self::NumPages => 0,
            Self::Actual => 4,
            Self::FreePageHintCmdId => 8,
            Self::PoisonVal => 12,
        }
    }

    /// Returns true for the two fields that a driver may write.
    pub const fn is_driver_writable(self) -> bool {
        matches!(self, Self::Actual | Self::PoisonVal)
    }
}

/// The values of the configuration space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConfigSpace {
    /// See [`Field::NumPages`].
    pub num_pages: u32,
    /// See [`Field::Actual`].
    pub actual: u32,
    /// See [`Field::FreePageHintCmdId`].
    pub free_page_hint_cmd_id: u32,
    /// See [`Field::PoisonVal`].
    pub poison_val: u32,
}

/// Why a driver's write was refused. Both are the guest's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteError {
    /// Not exactly one field: the wrong length or offset.
    NotAField,
    /// A field that only the device may write.
    ReadOnly(Field),
}

impl ConfigSpace {
    /// Returns the wire format.
    pub fn to_bytes(&self) -> [u8; CONFIG_BYTES] {
        let mut bytes = [0; CONFIG_BYTES];
        for field in Field::ALL {
            let at = field.offset();
            bytes[at..at + 4].copy_from_slice(&self.get(field).to_le_bytes());
        }
        bytes
    }

    /// Value of one field.
    pub const fn get(&self, field: Field) -> u32 {
        match field {
            Field::NumPages => self.num_pages,
            Field::Actual => self.actual,
            Field::FreePageHintCmdId => self.free_page_hint_cmd_id,
            Field::PoisonVal => self.poison_val,
        }
    }

    /// Applies a driver's write of `data` at `offset`. Returns the field and its new value.
    /// Changes nothing on an error.
    pub fn driver_write(&mut self, offset: u32, data: &[u8]) -> Result<(Field, u32), WriteError> {
        let field = Field::ALL
            .into_iter()
            .find(|field| field.offset() as u64 == u64::from(offset))
            .ok_or(WriteError::NotAField)?;
        let bytes: [u8; 4] = data.try_into().map_err(|_| WriteError::NotAField)?;
        let value = u32::from_le_bytes(bytes);
        match field {
            Field::Actual => self.actual = value,
            Field::PoisonVal => self.poison_val = value,
            Field::NumPages | Field::FreePageHintCmdId => return Err(WriteError::ReadOnly(field)),
        }
        Ok((field, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_little_endian_in_wire_order() {
        let config = ConfigSpace {
            num_pages: 0x0403_0201,
            actual: 0x0807_0605,
            free_page_hint_cmd_id: 0x0c0b_0a09,
            poison_val: 0x100f_0e0d,
        };
        assert_eq!(config.to_bytes(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
    }

    #[test]
    fn a_driver_can_write_only_its_own_fields() {
        let mut config = ConfigSpace { num_pages: 7, ..Default::default() };
        assert_eq!(config.driver_write(4, &[9, 0, 0, 0]), Ok((Field::Actual, 9)));
        assert_eq!(
            config.driver_write(0, &[1, 0, 0, 0]),
            Err(WriteError::ReadOnly(Field::NumPages))
        );
        assert_eq!(
            config.driver_write(8, &[1, 0, 0, 0]),
            Err(WriteError::ReadOnly(Field::FreePageHintCmdId))
        );
        assert_eq!(config.num_pages, 7);
        assert_eq!(config.actual, 9);
    }

    #[test]
    fn a_write_that_is_not_one_field_changes_nothing() {
        let mut config = ConfigSpace::default();
        for (offset, len) in [(4, 3), (4, 8), (5, 4), (16, 4), (u32::MAX, 4), (4, 0)] {
            assert_eq!(
                config.driver_write(offset, &[1; 8][..len]),
                Err(WriteError::NotAField),
                "{offset}+{len}"
            );
        }
        assert_eq!(config, ConfigSpace::default());
    }
}
