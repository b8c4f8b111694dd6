//! The methods of all services, and first inputs for each.

use std::sync::LazyLock;

use aha_core::rollout::Sampling;
use aha_proto::v1;
use prost::Message;
use prost_types::FileDescriptorSet;

use crate::services::{MANIFEST_HASH, good_request};

pub const GENERATE: &str = "/aha.v1.Generator/Generate";
pub const JOIN: &str = "/aha.v1.Generator/JoinUpdateGroup";
/// What a first input is made of, beside the request.
const TOGETHER: u8 = 2;
const LEAVES: u8 = 3 << 6;

pub struct Method {
    /// `/package.Service/Method`.
    pub path: String,
    pub service: String,
}

/// By the protocol's own description, so that none is forgotten.
pub static METHODS: LazyLock<Vec<Method>> = LazyLock::new(|| {
    let files = FileDescriptorSet::decode(v1::FILE_DESCRIPTOR_SET).expect("it was made by the build").file;
    let mut methods = Vec::new();
    for file in &files {
        for service in &file.service {
            let name = format!("{}.{}", file.package(), service.name());
            methods.extend(
                service
                    .method
                    .iter()
                    .map(|method| Method { path: format!("/{name}/{}", method.name()), service: name.clone() }),
            );
        }
    }
    methods
});

/// One call of an input.
fn call(path: &str, flags: u8, message: &impl Message) -> Vec<u8> {
    let method = METHODS.iter().position(|method| method.path == path).expect("a method that there is");
    let message = message.encode_to_vec();
    let len = u16::try_from(message.len()).expect("a short message").to_le_bytes();
    [&[method as u8, flags], &len[..], &message].concat()
}

fn generator(method: &str, flags: u8, message: &impl Message) -> Vec<u8> {
    call(&format!("/aha.v1.Generator/{method}"), flags, message)
}

fn coordinator(method: &str, message: &impl Message) -> Vec<u8> {
    call(&format!("/aha.v1.Coordinator/{method}"), 0, message)
}

/// Every method with an empty request, those that take something with something, and some that belong together.
pub fn seeds() -> impl Iterator<Item = (String, Vec<u8>)> {
    let empty = METHODS.iter().map(|method| call(&method.path, 0, &()));
    let raw = METHODS.iter().map(|method| {
        let mut call = call(&method.path, 1, &());
        call[2] = 5;
        [call, vec![0, 0, 0, 0, 0]].concat()
    });
    let rich = [generate_seeds(), join_seeds(), sequence_seeds(), coordinator_seeds()].concat();
    let all: Vec<Vec<u8>> = empty.chain(raw).chain(rich).collect();
    all.into_iter().enumerate().map(|(index, seed)| (format!("seed-{index}"), seed))
}

fn generate_seeds() -> Vec<Vec<u8>> {
    let mut every = good_request("every");
    every.sampling = Some(v1::Sampling {
        top_k: 5,
        top_p: 0.9,
        min_p: 0.01,
        min_tokens: 2,
        stop: vec!["ab".to_owned(), "\u{e9}".to_owned()],
        stop_token_ids: vec![7],
        repetition_penalty: Some(1.1),
        presence_penalty: 0.5,
        frequency_penalty: -0.5,
        logit_bias: [(65, 3.0), (66, -3.0)].into(),
        bad_token_ids: vec![9],
        logprobs: 3,
        prompt_logprobs: true,
        ..v1::Sampling::from(&Sampling { max_tokens: 12, ..Sampling::default() })
    });
    let mut allowed = good_request("allowed");
    allowed.sampling.as_mut().expect("it has some").allowed_token_ids = vec![70, 71];
    let score = v1::ScoreRequest { token_ids: vec![1, 2, 3, 255] };
    vec![
        generator("Generate", 0, &good_request("plain")),
        generator("Generate", 0, &every),
        generator("Generate", LEAVES, &allowed),
        generator("Score", 0, &score),
    ]
}

fn join_seeds() -> Vec<Vec<u8>> {
    let join = v1::JoinUpdateGroupRequest {
        store_host: "127.0.0.1".to_owned(),
        store_port: 1,
        group: "strangers".to_owned(),
        rank: 1,
        size: 2,
        num_trainers: 1,
        manifest_hash: *MANIFEST_HASH,
        bucket_numel: 1000,
        timeout_seconds: 600_000.0,
        backend: v1::PushBackend::Gloo.into(),
        dtype: v1::WeightType::Float32.into(),
    };
    let soon = v1::JoinUpdateGroupRequest { timeout_seconds: 0.05, size: 3000, ..join.clone() };
    let peers = 0..8;
    let mut seeds: Vec<Vec<u8>> = peers.map(|peer| generator("JoinUpdateGroup", peer << 2, &join)).collect();
    seeds.push(generator("JoinUpdateGroup", 2 << 2, &soon));
    seeds.push(generator("JoinUpdateGroup", LEAVES, &join));
    seeds.push([generator("JoinUpdateGroup", TOGETHER, &join), generator("JoinUpdateGroup", 2 << 2, &join)].concat());
    seeds
}

fn sequence_seeds() -> Vec<Vec<u8>> {
    let (pause, resume, wake) = (v1::PauseRequest {}, v1::ResumeRequest {}, v1::WakeRequest {});
    let sleep = |drop_weights| v1::SleepRequest { drop_weights };
    let generate = |flags| generator("Generate", flags, &good_request("between"));
    let abort = v1::AbortRequest { request_id: "between".to_owned() };
    let push = v1::UpdateWeightsRequest { group: "strangers".to_owned(), version: 9, unit_hashes: vec![1, 2, 3] };
    vec![
        [generator("Pause", 0, &pause), generate(TOGETHER), generator("Resume", 0, &resume)].concat(),
        [generator("Sleep", 0, &sleep(false)), generate(TOGETHER), generator("Wake", 0, &wake)].concat(),
        [generator("Sleep", 0, &sleep(true)), generate(0), generator("Wake", 0, &wake)].concat(),
        [generate(TOGETHER), generator("Abort", 0, &abort)].concat(),
        [generate(TOGETHER), generate(TOGETHER), generator("Sleep", 0, &sleep(true))].concat(),
        generator("UpdateWeights", 0, &push),
    ]
}

fn coordinator_seeds() -> Vec<Vec<u8>> {
    let address = "127.0.0.1:7000".to_owned();
    let register = v1::RegisterRequest { address: address.clone(), manifest_hash: *MANIFEST_HASH };
    let status = v1::RunStatusRequest {};
    let leave = v1::LeaveRequest { address };
    let all =
        [coordinator("Register", &register), coordinator("RunStatus", &status), coordinator("Leave", &leave)].concat();
    vec![coordinator("Register", &register), all]
}
