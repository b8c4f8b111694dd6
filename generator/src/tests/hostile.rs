//! What careless and hostile clients send. Each gets a status that names the field and the bound, and a well-behaved
//! client that is served meanwhile notices nothing: its completions are those of a quiet generator, bit for bit.

use aha_proto::v1::generator_server::GeneratorServer as Service;
use futures::future::join_all;
use prost::Message;
use prost::bytes::{Buf, BufMut};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::MetadataValue;

use super::*;

type Client = GeneratorClient<Channel>;

/// Where a status must end, whatever was sent.
const LONGEST_MESSAGE: usize = 1100;

/// What the well-behaved client asks for.
fn good(id: &str, max_tokens: u32) -> v1::GenerateRequest {
    let mut request = request(id, 3, max_tokens);
    request.rewards = ["equation", "format"].map(reward).to_vec();
    request.columns = r#"{"target": 3, "nums": [1, 2]}"#.to_owned();
    let sampling = request.sampling.as_mut().unwrap();
    (sampling.frequency_penalty, sampling.stop, sampling.prompt_logprobs) = (0.3, vec!["never".to_owned()], true);
    request
}

async fn served(mut client: Client, request: v1::GenerateRequest) -> Vec<v1::Completion> {
    let mut call = Request::new(request);
    call.set_timeout(PATIENCE);
    collect(client.generate(call).await.unwrap().into_inner()).await.unwrap()
}

/// Lets `act` do its worst while a client is served.
async fn beside_a_good_client(max_tokens: u32, act: impl AsyncFnOnce(&mut Server)) {
    let mut server = Server::start(Tiny::Qwen2).await;
    let quiet = served(server.client.clone(), good("quiet", max_tokens)).await;
    let disturbed = tokio::spawn(served(server.client.clone(), good("disturbed", max_tokens)));
    let before = server.status().await.generation_tokens;
    server.wait_until(|status| status.generation_tokens > before).await;
    act(&mut server).await;
    assert_eq!(disturbed.await.unwrap(), quiet);
    let status = server.wait_until(|status| status.used_blocks == 0 && status.waiting == 0).await;
    assert_eq!(status.running, 0);
}

#[track_caller]
fn check_short(status: &Status, code: Code, messages: &[&str], what: &str) {
    assert_eq!(status.code(), code, "{what}: {status}");
    assert!(status.message().len() < LONGEST_MESSAGE, "{what}: {} bytes", status.message().len());
    for message in messages {
        assert!(status.message().contains(message), "{what}: no {message:?} in {status}");
    }
}

type Damage = fn(&mut v1::GenerateRequest);
type SamplingDamage = fn(&mut v1::Sampling);

const MEGABYTE: usize = 1 << 20;

/// What is wrong, and what the status must say of it.
const BAD_REQUESTS: [(&str, &[&str], Damage); 20] = [
    ("no request id", &["request_id: ", "1 to 256 bytes, got 0"], |r| r.request_id.clear()),
    ("a book as request id", &["request_id: ", "got 1048576"], |r| r.request_id = "x".repeat(MEGABYTE)),
    ("no prompt", &["token_ids: ", "at least 1 token"], |r| r.token_ids.clear()),
    ("a token beyond the vocabulary", &["token_ids: token 260 at index 0", "260"], |r| r.token_ids[0] = 260),
    ("the largest token", &["token_ids: token 4294967295 at index 23"], |r| r.token_ids.push(u32::MAX)),
    ("a prompt beyond the limit", &["sampling.max_tokens: 4089 ", "max_model_len 4096"], |r| {
        r.token_ids = vec![7; 4089]
    }),
    ("a prompt of a million tokens", &["1000000 tokens of prompt", "4096"], |r| r.token_ids = vec![7; 1_000_000]),
    ("n = 0", &["sample_indices: must name 1 to 1024 samples, got 0"], |r| r.sample_indices.clear()),
    ("n = 1025", &["sample_indices: must name 1 to 1024", "1025"], |r| r.sample_indices = (0..1025).collect()),
    ("a huge n", &["1000000 would join", "262144"], |r| r.sample_indices = (0..1_000_000).collect()),
    ("a sample twice", &["sample_indices: 0 is named twice"], |r| r.sample_indices.push(0)),
    ("no sampling", &["sampling: is missing"], |r| r.sampling = None),
    ("an unknown reward", &["rewards: \"equasion\" ", "\"equation\""], |r| r.rewards = vec![reward("equasion")]),
    ("a book as reward", &["rewards: one has 2097152 bytes"], |r| r.rewards = vec![reward(&"x".repeat(MEGABYTE))]),
    ("a reward twice", &["rewards: format is named twice"], |r| r.rewards = vec![reward("format"); 2]),
    ("a hundred thousand rewards", &["rewards: must be at most 64"], |r| r.rewards = vec![reward("format"); 100_000]),
    ("columns that are no JSON", &["columns: must be a JSON object"], |r| r.columns = "{".to_owned()),
    ("deep columns", &["columns: ", "recursion limit"], |r| r.columns = r#"{"a":"#.repeat(MEGABYTE)),
    ("columns without the one that is read", &["columns: ", "\"target\""], |r| {
        let columns: Vec<String> = (0..100_000).map(|index| format!("\"targe{index}\":0")).collect();
        (r.rewards, r.columns) = (vec![reward("equation")], format!("{{{}}}", columns.join(",")));
    }),
    ("a column of a wrong kind", &["columns: ", "\"target\" must be"], |r| {
        r.rewards = vec![reward("equation")];
        r.columns = format!("{{\"target\": \"{}\", \"nums\": [1]}}", "x".repeat(MEGABYTE));
    }),
];

/// The same for the options of sampling.
const BAD_SAMPLING: [(&str, &[&str], SamplingDamage); 25] = [
    ("NaN temperature", &["sampling: temperature", ">= 0, got NaN"], |s| s.temperature = f32::NAN),
    ("infinite temperature", &["sampling: temperature", "got inf"], |s| s.temperature = f32::INFINITY),
    ("negative temperature", &["sampling: temperature", "got -1"], |s| s.temperature = -1.0),
    ("NaN top_p", &["sampling: top_p must be in (0, 1], got NaN"], |s| s.top_p = f32::NAN),
    ("top_p = 0", &["sampling: top_p", "got 0"], |s| s.top_p = 0.0),
    ("top_p > 1", &["sampling: top_p", "got 1.5"], |s| s.top_p = 1.5),
    ("NaN min_p", &["sampling: min_p must be in [0, 1], got NaN"], |s| s.min_p = f32::NAN),
    ("no tokens", &["sampling: max_tokens must be at least 1"], |s| s.max_tokens = 0),
    ("endless tokens", &["sampling.max_tokens: ", "4294967295", "4096"], |s| s.max_tokens = u32::MAX),
    ("min_tokens > max_tokens", &["sampling: min_tokens (9) is over max_tokens (8)"], |s| s.min_tokens = 9),
    ("a million stop strings", &["64 stop strings, got 1000000"], |s| s.stop = vec!["x".to_owned(); 1_000_000]),
    ("a stop string of 10 MB", &["1 to 1024 bytes, got 10485760"], |s| s.stop = vec!["x".repeat(10 * MEGABYTE)]),
    ("an empty stop string", &["1 to 1024 bytes, got 0"], |s| s.stop = vec![String::new()]),
    ("a stop token beyond the vocabulary", &["sampling.stop_token_ids: token 260"], |s| s.stop_token_ids = vec![260]),
    ("a million stop tokens", &["sampling.stop_token_ids: has 1000000", "260"], |s| {
        s.stop_token_ids = vec![1; 1_000_000]
    }),
    ("NaN repetition_penalty", &["repetition_penalty", "got NaN"], |s| s.repetition_penalty = Some(f32::NAN)),
    ("repetition_penalty = 0", &["repetition_penalty", "> 0, got 0"], |s| s.repetition_penalty = Some(0.0)),
    ("NaN presence_penalty", &["presence_penalty must be in [-2, 2], got NaN"], |s| s.presence_penalty = f32::NAN),
    ("a frequency_penalty out of range", &["frequency_penalty must be in [-2, 2]"], |s| s.frequency_penalty = 3.0),
    ("a bias of NaN", &["logit_bias of token 7", "got NaN"], |s| s.logit_bias = [(7, f32::NAN)].into()),
    ("an infinite bias", &["logit_bias of token 7", "got -inf"], |s| s.logit_bias = [(7, f32::NEG_INFINITY)].into()),
    ("a bias beyond the vocabulary", &["sampling.logit_bias: token 260"], |s| s.logit_bias = [(260, 1.0)].into()),
    ("nothing allowed", &["sampling.allowed_token_ids: no token is left"], |s| {
        (s.allowed_token_ids, s.bad_token_ids) = (vec![1, 2], vec![2, 1]);
    }),
    ("everything bad", &["sampling.bad_token_ids: no token is left"], |s| s.bad_token_ids = (0..260).collect()),
    ("logprobs of everything", &["logprobs must be at most 20, got 4294967295"], |s| s.logprobs = u32::MAX),
];

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_by_field_and_bound() {
    let server = Server::start(Tiny::Qwen2).await;
    let quiet = served(server.client.clone(), good("quiet", 12)).await;
    let bad = |damage: Damage| {
        let mut bad = request("bad", 1, 8);
        damage(&mut bad);
        bad
    };
    let bad_sampling = |damage: SamplingDamage| {
        let mut bad = request("bad", 1, 8);
        damage(bad.sampling.as_mut().unwrap());
        bad
    };
    let requests = BAD_REQUESTS.iter().map(|&(what, messages, damage)| (what, messages, bad(damage)));
    let samplings = BAD_SAMPLING.iter().map(|&(what, messages, damage)| (what, messages, bad_sampling(damage)));
    for (what, messages, bad) in requests.chain(samplings) {
        let (mut client, mut call) = (server.client.clone(), Request::new(bad));
        call.set_timeout(PATIENCE);
        let (refused, undisturbed) =
            tokio::join!(client.generate(call), served(server.client.clone(), good("undisturbed", 12)));
        let code = if what == "a huge n" { Code::ResourceExhausted } else { Code::InvalidArgument };
        check_short(&refused.unwrap_err(), code, messages, what);
        assert_eq!(undisturbed, quiet, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_calls_with_nonsense_are_refused_too() {
    beside_a_good_client(200, async |server| {
        let book = "x".repeat(10 * MEGABYTE);
        for (tokens, message) in
            [(vec![], "1 to 4096 tokens, got 0"), (vec![1; 4097], "got 4097"), (vec![260], "token 260")]
        {
            let refused = server.client.score(v1::ScoreRequest { token_ids: tokens }).await.unwrap_err();
            check_short(&refused, Code::InvalidArgument, &["token_ids: ", message], "score");
        }
        let refused = server.client.abort(v1::AbortRequest { request_id: book.clone() }).await.unwrap_err();
        check_short(&refused, Code::NotFound, &["request_id: "], "abort");
        let push = v1::UpdateWeightsRequest { group: book.clone(), version: 1, unit_hashes: vec![1; 1_000_000] };
        let refused = server.client.update_weights(push).await.unwrap_err();
        check_short(&refused, Code::FailedPrecondition, &["group: "], "push");

        let mut large = request("large", 1, 8);
        large.columns = "x".repeat(17 * MEGABYTE);
        let refused = server.generate(large).await.unwrap_err();
        check_short(&refused, Code::OutOfRange, &["17825", "the limit is: 16777216"], "a message beyond the limit");
    })
    .await;
}

/// Passes bytes as they are.
#[derive(Debug, Default)]
pub(super) struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, bytes: Vec<u8>, target: &mut EncodeBuf<'_>) -> Result<(), Status> {
        target.put_slice(&bytes);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(source.copy_to_bytes(source.remaining()).into()))
    }
}

async fn generate_raw(server: &Server, bytes: Vec<u8>) -> Result<Vec<v1::Completion>, Status> {
    let mut grpc = tonic::client::Grpc::new(server.channel.clone());
    grpc.ready().await.unwrap();
    let mut call = Request::new(bytes);
    call.set_timeout(PATIENCE);
    let path = format!("/{}/Generate", <Service<()> as tonic::server::NamedService>::NAME);
    let stream = grpc.server_streaming(call, path.parse::<PathAndQuery>().unwrap(), Raw).await?;
    let (mut stream, mut completions) = (stream.into_inner(), Vec::new());
    while let Some(bytes) = stream.message().await? {
        completions.push(v1::Completion::decode(&*bytes).unwrap());
    }
    Ok(completions)
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_request_are_refused_and_of_a_bias_named_twice_the_last_counts() {
    beside_a_good_client(200, async |server| {
        let asked = request("raw", 1, 8);
        let mut cut = asked.encode_to_vec();
        cut.pop();
        let refused = generate_raw(server, cut).await.unwrap_err();
        check_short(&refused, Code::Internal, &["decode"], "a request that is cut off");

        // Field 5 is merged into the sampling before it; its field 13 is the bias: token 65, once forbidden and once forced.
        let entry = |bias: f32| [&[0x6a, 7, 8, 65, 0x15][..], &bias.to_le_bytes()].concat();
        let entries = [entry(-100.0), entry(100.0)].concat();
        let bytes = [asked.encode_to_vec(), vec![0x2a, entries.len() as u8], entries].concat();
        let completions = generate_raw(server, bytes).await.unwrap();
        assert_eq!(completions[0].token_ids, [65; 8]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_without_a_deadline_or_with_one_that_has_passed_are_refused() {
    beside_a_good_client(200, async |server| {
        let refused = server.client.generate(request("none", 1, 8)).await.unwrap_err();
        check_short(&refused, Code::InvalidArgument, &["grpc-timeout: is missing"], "no deadline");
        let mut call = Request::new(request("odd", 1, 8));
        call.metadata_mut().insert("grpc-timeout", MetadataValue::from_static("1 week"));
        let refused = server.client.generate(call).await.unwrap_err();
        check_short(&refused, Code::InvalidArgument, &["grpc-timeout: ", "\"1 week\""], "no duration");
        let mut call = Request::new(request("past", 3, ENDLESS));
        call.set_timeout(Duration::ZERO);
        // The client gives up by itself, so what the server says is tested where it says it.
        assert!(
            [Code::Cancelled, Code::DeadlineExceeded].contains(&server.client.generate(call).await.unwrap_err().code())
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_disconnects_frees_its_blocks_at_once() {
    beside_a_good_client(400, async |server| {
        let before = server.status().await.used_blocks;
        let stream = server.generate(request("dropped", 4, ENDLESS)).await.unwrap();
        server.wait_until(|status| status.running == 7).await;
        drop(stream);
        let dropped = server.status().await.steps;
        let after = server.wait_until(|status| status.running <= 3 && status.waiting == 0).await;
        assert!(after.used_blocks <= before + 3 * 400 / 16, "{after:?}");
        assert!(after.steps - dropped < 50, "{} steps", after.steps - dropped);
        // Its id is free again.
        assert_eq!(server.completions(request("dropped", 1, 2)).await.len(), 1);
    })
    .await;
}

/// Sends requests of `num_samples` each at once; how many are taken, and what the others are told.
async fn flood(
    server: &Server,
    num_requests: usize,
    num_samples: u32,
) -> (Vec<Streaming<v1::Completion>>, Vec<Status>) {
    let calls = (0..num_requests).map(|index| {
        let mut client = server.client.clone();
        let mut call = Request::new(request(&format!("flood {index}"), num_samples, ENDLESS));
        call.set_timeout(PATIENCE);
        async move { client.generate(call).await.map(tonic::Response::into_inner) }
    });
    let (mut taken, mut refused) = (Vec::new(), Vec::new());
    for answer in join_all(calls).await {
        match answer {
            Ok(stream) => taken.push(stream),
            Err(status) => refused.push(status),
        }
    }
    (taken, refused)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_requests_is_taken_up_to_the_limit() {
    beside_a_good_client(1000, async |server| {
        let (taken, refused) = flood(server, 4200, 1).await;
        // The good client's is one of the 4096.
        assert_eq!((taken.len(), refused.len()), (4095, 105));
        for status in refused {
            check_short(
                &status,
                Code::ResourceExhausted,
                &["4096 requests are in flight", "the limit is 4096"],
                "flood",
            );
        }
        drop(taken);
        server.wait_until(|status| status.running + status.waiting <= 3).await;
        assert_eq!(server.completions(request("after the flood", 2, 8)).await.len(), 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_samples_is_taken_up_to_the_limit() {
    beside_a_good_client(200, async |server| {
        // The tests' own checks of a queue this long would take longer than the steps.
        server.client.pause(v1::PauseRequest {}).await.unwrap();
        let (taken, refused) = flood(server, 260, 1024).await;
        assert_eq!((taken.len(), refused.len()), (255, 5));
        for status in refused {
            check_short(&status, Code::ResourceExhausted, &["1024 would join them", "the limit is 262144"], "flood");
        }
        drop(taken);
        server.wait_until(|status| status.running + status.waiting <= 3).await;
        server.client.resume(v1::ResumeRequest {}).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_scores_lets_steps_be_taken_in_between() {
    // Its steps outlast the flood, however late that begins.
    beside_a_good_client(1000, async |server| {
        let before = server.status().await;
        let calls = (0..1500).map(|_| {
            let mut client = server.client.clone();
            async move { client.score(v1::ScoreRequest { token_ids: vec![7; 64] }).await }
        });
        let answers = join_all(calls).await;
        let refused: Vec<&Status> = answers.iter().filter_map(|answer| answer.as_ref().err()).collect();
        assert!(refused.len() < 500, "{} refused", refused.len());
        for status in refused {
            check_short(status, Code::ResourceExhausted, &["1024 scores are waiting, which is the limit"], "flood");
        }
        let after = server.status().await;
        assert!(after.steps - before.steps > 100, "{} steps", after.steps - before.steps);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_reads_holds_up_nobody_and_loses_what_it_left_at_its_deadline() {
    let deadline = Duration::from_secs(8);
    beside_a_good_client(400, async |server| {
        let endpoint = Channel::from_shared(format!("http://{}", server.address)).unwrap();
        let endpoint = endpoint.initial_stream_window_size(1024).initial_connection_window_size(1024);
        let mut slow = GeneratorClient::new(endpoint.connect().await.unwrap());
        let mut large = request("slow", 16, 100);
        large.sampling.as_mut().unwrap().logprobs = 20;
        let mut call = Request::new(large);
        call.set_timeout(deadline);
        let mut stream = slow.generate(call).await.unwrap().into_inner();
        // The engine is done with it, and only its client is not.
        server.wait_until(|status| status.running + status.waiting <= 3).await;
        check_status(&server.generate(request("slow", 1, 2)).await.unwrap_err(), Code::AlreadyExists, "slow");
        let taken_again = async {
            while let Err(status) = server.generate(request("slow", 1, 2)).await {
                check_status(&status, Code::AlreadyExists, "slow");
            }
        };
        tokio::time::timeout(PATIENCE, taken_again).await.expect("its place is given up");

        // It gets what was under way, and is told that the rest is lost.
        let mut num_read = 0;
        let ended = loop {
            match stream.message().await {
                Ok(Some(_)) => num_read += 1,
                ended => break ended,
            }
        };
        let lost = format!("{num_read} of 16 completions");
        check_status(&ended.unwrap_err(), Code::DeadlineExceeded, &lost);
        assert!((1..10).contains(&num_read), "{num_read}");
    })
    .await;
}
