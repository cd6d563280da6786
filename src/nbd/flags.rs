//! Sets of flags.

/// Defines a set of flags as a number with named bits.
macro_rules! flags {
    ($(#[$about:meta])* $name:ident: $number:ty { $($(#[$flag_about:meta])* $flag:ident = $bit:literal,)* }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct $name(pub $number);

        impl $name {
            $($(#[$flag_about])* pub const $flag: Self = Self(1 << $bit);)*

            /// No flag.
            pub const NONE: Self = Self(0);

            /// All flags that have names.
            pub const ALL: Self = Self(0 $(| 1 << $bit)*);

            /// Whether all of `flags` are set.
            #[must_use]
            pub const fn contains(self, flags: Self) -> bool {
                self.0 & flags.0 == flags.0
            }

            /// These and `flags`.
            #[must_use]
            pub const fn with(self, flags: Self) -> Self {
                Self(self.0 | flags.0)
            }

            /// These without `flags`.
            #[must_use]
            pub const fn without(self, flags: Self) -> Self {
                Self(self.0 & !flags.0)
            }

            /// These, and `flags` if `set`.
            #[must_use]
            pub const fn with_if(self, set: bool, flags: Self) -> Self {
                if set { self.with(flags) } else { self }
            }
        }
    };
}

flags! {
    /// What a server says of its handshake.
    HandshakeFlags: u16 {
        /// It answers options that it does not know.
        FIXED_NEWSTYLE = 0,
        /// It can leave out the 124 zero bytes after an export that was asked for by [`ClientOption::ExportName`](super::ClientOption::ExportName).
        NO_ZEROES = 1,
    }
}

flags! {
    /// What a client takes of a server's handshake.
    ClientFlags: u32 {
        /// It knows answers to options.
        FIXED_NEWSTYLE = 0,
        /// It does not want the 124 zero bytes.
        NO_ZEROES = 1,
    }
}

flags! {
    /// What an export can do.
    TransmissionFlags: u16 {
        /// Always set.
        HAS_FLAGS = 0,
        /// Writing is refused.
        READ_ONLY = 1,
        /// [`Command::Flush`](super::Command::Flush) is known.
        SEND_FLUSH = 2,
        /// [`CommandFlags::FUA`] is known.
        SEND_FUA = 3,
        /// It is better read in order.
        ROTATIONAL = 4,
        /// [`Command::Trim`](super::Command::Trim) is known.
        SEND_TRIM = 5,
        /// [`Command::WriteZeroes`](super::Command::WriteZeroes) is known.
        SEND_WRITE_ZEROES = 6,
        /// [`CommandFlags::DF`] is known; only with structured replies.
        SEND_DF = 7,
        /// A flush on one connection covers what any other was told to be written.
        CAN_MULTI_CONN = 8,
        /// An experiment of the specification's: resizing.
        SEND_RESIZE = 9,
        /// [`Command::Cache`](super::Command::Cache) is known.
        SEND_CACHE = 10,
        /// [`CommandFlags::FAST_ZERO`] is known.
        SEND_FAST_ZERO = 11,
        /// A block status may be asked for in some contexts only; only with extended headers.
        BLOCK_STATUS_PAYLOAD = 12,
    }
}

flags! {
    /// How a request is to be carried out.
    CommandFlags: u16 {
        /// What is written is durable before the answer.
        FUA = 0,
        /// Zeros are not to become holes.
        NO_HOLE = 1,
        /// The bytes of a read come in one chunk.
        DF = 2,
        /// One extent of each context is enough.
        REQ_ONE = 3,
        /// Zero only if that is faster than writing.
        FAST_ZERO = 4,
        /// With extended headers: the length is that of a payload.
        PAYLOAD_LEN = 5,
    }
}

flags! {
    /// What a chunk of a structured reply is marked with.
    ChunkFlags: u16 {
        /// The last chunk of its reply.
        DONE = 0,
    }
}
