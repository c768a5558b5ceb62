//! The control API of a balloon: HTTP and JSON on a Unix socket.
//!
//! [`api`] has the JSON types. A process that serves a balloon implements [`BalloonControl`] and
//! passes it to a [`Server`]; a program that controls a balloon uses a [`Client`].
//! `docs/openapi.json` describes the API for other languages.
//!
//! This crate is independent of devices, virtqueues and guest addresses.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

pub mod api;
mod app;
mod balloon;
mod bitmap;
mod client;
mod connection;
mod error;
mod free_map;
mod guest_routes;
mod limits;
mod metrics;
mod name;
mod openapi;
mod picture;
mod router;
mod routes;
mod runtime_dir;
mod server;
mod size;
mod socket;
mod vmm;
mod waiter_slots;

pub use api::{
    BALLOON_PAGE_BYTES, BalloonChange, BalloonStatus, Direction, Driver, Faults, FreePageHints,
    GuestStatus, HintOutcome, PartialHuge, Problem, ReleaseMode, ReleaseStatus, ReportsStatus,
    SetBalloon, SetRelease, SetStats, StagesMs, StatsStatus, Status,
};
pub use balloon::{BalloonControl, GuestAnswer, GuestRequest};
pub use bitmap::{FIRST_PAGE_HEADER, ID_HEADER, PAGES_HEADER, REGIONS_HEADER};
pub use client::{BitmapLayout, Client};
pub use error::{ControlError, GuestErrorKind};
pub use free_map::FreePagesMap;
pub use limits::{Limits, MAX_BODY_BYTES};
pub use name::{GuestName, MAX_NAME_BYTES};
pub use openapi::text as openapi_text;
pub use runtime_dir::{
    RUNTIME_DIR_VAR, ensure_runtime_dir, list_sockets, runtime_dir, socket_path,
};
pub use server::Server;
pub use size::{ParseSizeError, Size};
pub use socket::{MAX_SOCKET_PATH_BYTES, SocketAccess, SocketFile, listen_on};
pub use vmm::VmmControl;
