//! Every call of every service, with any request: each is answered at its deadline at the latest, and a client that asks
//! for something sensible afterwards gets what it got before.
//!
//! An input is a row of calls to a generator and to a coordinator in this process: a byte that chooses the method, a byte
//! of [`Flags`], two bytes of length, and the request.
#![no_main]

#[path = "../growth.rs"]
mod growth;
mod methods;
mod peers;
#[path = "../seeds.rs"]
mod seeds;
mod services;
mod wire;

use std::time::Duration;

use aha_proto::v1;
use futures::future::join_all;
use libfuzzer_sys::fuzz_target;
use prost::Message;

use methods::{JOIN, METHODS, Method};
use services::Services;
use wire::Answer;

/// Calls of an input; more would take long without being anything new.
const MAX_CALLS: usize = 6;
/// How much later than its deadline an answer may come on a loaded machine.
const SLACK: Duration = Duration::from_secs(6);

/// How a call is made.
#[derive(Clone, Copy)]
struct Flags(u8);

impl Flags {
    /// The bytes are those of HTTP's body, in place of a message within one.
    fn is_raw(self) -> bool {
        self.0 & 1 != 0
    }

    /// The next call does not wait for this one.
    fn is_beside(self) -> bool {
        self.0 & 2 != 0
    }

    /// What listens where an update group is to be joined.
    fn peer(self) -> usize {
        usize::from(self.0 >> 2 & 7)
    }

    /// For the call. Where there is none, the client goes away instead.
    fn deadline(self) -> Option<Duration> {
        [Some(100), Some(10), Some(400), None][usize::from(self.0 >> 6)].map(Duration::from_millis)
    }
}

struct Call {
    method: &'static Method,
    flags: Flags,
    body: Vec<u8>,
}

thread_local! {
    /// Until the process ends.
    static SERVICES: &'static Services = Box::leak(Box::new(Services::start()));
}

fuzz_target!(init: seeds::write(methods::seeds()), |bytes: &[u8]| {
    SERVICES.with(|services| {
        let mut beside = Vec::new();
        for call in calls(bytes) {
            let is_beside = call.flags.is_beside();
            beside.push(call);
            if !is_beside {
                services.block_on(join_all(beside.drain(..).map(|call| make(services, call))));
            }
        }
        services.block_on(join_all(beside.into_iter().map(|call| make(services, call))));
        services.check();
    });
    growth::check();
});

fn calls(mut bytes: &[u8]) -> Vec<Call> {
    let mut calls = Vec::new();
    while let [method, flags, low, high, rest @ ..] = bytes
        && calls.len() < MAX_CALLS
    {
        let method = &METHODS[usize::from(*method) % METHODS.len()];
        let flags = Flags(*flags);
        let (message, others) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes([*low, *high]))));
        calls.push(Call { method, flags, body: body(method, flags, message) });
        bytes = others;
    }
    calls
}

/// HTTP's body. What is to be joined lies in this process, whatever the input says: nobody else is bothered.
fn body(method: &Method, flags: Flags, message: &[u8]) -> Vec<u8> {
    let is_join = method.path == JOIN;
    if flags.is_raw() && !is_join {
        return message.to_vec();
    }
    match v1::JoinUpdateGroupRequest::decode(message) {
        Ok(join) if is_join => wire::frame(&peers::redirect(join, flags.peer()).encode_to_vec()),
        _ => wire::frame(message),
    }
}

async fn make(services: &Services, call: Call) {
    let Call { method, flags, body } = call;
    let connection = services.connect(method).await;
    let answered = wire::call(connection, &method.path, flags.deadline(), body);
    match flags.deadline() {
        Some(deadline) => {
            let answered = tokio::time::timeout(deadline + SLACK, answered).await;
            let answer: Result<Answer, h2::Error> =
                answered.unwrap_or_else(|_| panic!("{} was not answered {SLACK:?} after its deadline", method.path));
            // A stream that is reset is an answer to what is no gRPC.
            assert!(answer.is_ok() || flags.is_raw(), "{}: {:?}", method.path, answer.err());
        }
        // Dropping a call resets it.
        None => drop(tokio::time::timeout(Duration::from_millis(50), answered).await),
    }
}
