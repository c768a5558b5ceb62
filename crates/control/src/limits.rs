//! Limits on what clients can use, and how long anything may take.

use std::time::Duration;

use crate::api::MAX_TIMEOUT_MS;

/// Longest request body. The three TLS paths of a migration fit, each of `PATH_MAX` bytes.
pub const MAX_BODY_BYTES: usize = 16 * 1024;

/// Longest single call into the balloon while a client waits. Between calls the server checks
/// whether it must stop and whether the client is still connected.
pub(crate) const WAIT_SLICE: Duration = Duration::from_millis(250);

/// Time after a request's timeout at which the balloon should have ended it.
pub(crate) const ANSWER_MARGIN: Duration = Duration::from_secs(5);

/// Limits on the resources that clients can use. Production uses [`Limits::default`].
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Concurrent connections. For a new one beyond the limit, the server closes the connection
    /// whose client has been slowest to send its request or read its response. A connection costs
    /// a buffer of 16 KiB, and a thread while it calls the balloon.
    pub connections: usize,
    /// Connections that may wait for a change; fewer than `connections`, so that other clients
    /// are still served.
    pub waiters: usize,
    /// Waiters per client process, so that a process that hangs cannot use up all slots.
    pub waiters_each: usize,
    /// Concurrent requests to migrate, save or resolve the guest. Each may wait for a name server
    /// or for another host.
    pub migrations: usize,
    /// Concurrent large responses: bitmaps and pictures. Each keeps a report of free pages alive
    /// while it is read.
    pub bulk: usize,
    /// Timeout for the head of a request, and again for its body. The client is on the same host.
    pub request_timeout: Duration,
    /// Longest time in which a client may read no byte of its response.
    pub stall_timeout: Duration,
    /// Time in which a client must read its whole response.
    pub answer_timeout: Duration,
    /// Longest wait for a change; a longer `wait_ms` is reduced to this.
    pub max_wait: Duration,
    /// Longest timeout of a request to the guest; a longer `timeout_ms` is refused.
    pub max_request: Duration,
    /// Time for requests in progress to finish when the server stops.
    pub stop_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            waiters: 32,
            waiters_each: 16,
            migrations: 4,
            bulk: 4,
            request_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(5),
            answer_timeout: Duration::from_secs(60),
            max_wait: Duration::from_secs(60),
            max_request: Duration::from_millis(MAX_TIMEOUT_MS),
            stop_timeout: Duration::from_secs(1),
        }
    }
}
