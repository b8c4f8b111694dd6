//! deploy/compose.

use std::path::PathBuf;

use aha_tests::golden::workspace;
use serde_json::Value;

use crate::commands::Invocation;
use crate::{WORKDIR, at, check_folders, check_image, deploy, list, number, seconds, text, yaml};

/// `${NAME:-default}` becomes its default.
fn with_defaults(text: &str) -> String {
    let mut result = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        let (variable, after) = after.split_once('}').expect("a variable ends");
        let (_, default) = variable.split_once(":-").expect("a variable has a default");
        result = result + before + default;
        rest = after;
    }
    result + rest
}

fn texts(value: &Value, pointer: &str) -> Vec<String> {
    list(value, pointer).iter().map(|item| with_defaults(item.as_str().unwrap())).collect()
}

#[test]
fn one_service_launches_a_run_on_one_machine() {
    let documents = yaml(&deploy("compose/compose.yaml"));
    let [compose] = documents.as_slice() else { panic!("one document") };
    let service = at(compose, "/services/aha");
    check_image(text(service, "/image"));
    let context = deploy("compose").join(text(service, "/build/context"));
    assert!(context.join(text(service, "/build/dockerfile")).is_file());
    assert!(context.join("Cargo.toml").is_file());

    let environment = at(service, "/environment").as_object().unwrap();
    let variables: Vec<(String, String)> =
        environment.iter().map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned())).collect();
    assert!(variables.iter().all(|(name, _)| name.starts_with("AHA__")), "{variables:?}");
    let command = Invocation::new(&texts(service, "/command"));
    assert_eq!(command.subcommand(), "launch");
    assert!(command.is_taken(), "aha does not take {:?}", command.words);
    let config = command.load(&workspace().join(command.recipe()), &variables);

    let device = at(service, "/deploy/resources/reservations/devices/0");
    assert_eq!((text(device, "/driver"), text(device, "/capabilities/0")), ("nvidia", "gpu"));
    let launch = &config.launch;
    assert_eq!(number(device, "/count"), (launch.trainers + launch.generators) as u64, "a GPU for every role");
    assert!(seconds(text(service, "/stop_grace_period")) >= launch.save_seconds + 2.0 * launch.grace_seconds);

    let volumes = texts(service, "/volumes");
    let volumes: Vec<Vec<&str>> = volumes.iter().map(|volume| volume.split(':').collect()).collect();
    let targets: Vec<&str> = volumes.iter().map(|volume| volume[1]).collect();
    check_folders(&config, &targets);
    for volume in &volumes {
        let name = volume[1].strip_prefix(WORKDIR).unwrap();
        assert_eq!(volume[0], format!("../..{name}"), "the folder of the same name");
        assert_eq!(volume.get(2), (name != "/runs").then_some(&"ro"), "only runs are written");
    }
    let metrics = config.generator.metrics_address.unwrap();
    assert!(metrics.ip().is_unspecified(), "{metrics} is not reached from outside the container");
    assert_eq!(texts(service, "/ports"), [format!("127.0.0.1:{0}:{0}", metrics.port())]);
    let test = texts(service, "/healthcheck/test");
    assert_eq!(test.last().unwrap(), &format!("http://127.0.0.1:{}/metrics", metrics.port()));
}

#[test]
fn the_service_is_confined_and_comes_back() {
    let documents = yaml(&deploy("compose/compose.yaml"));
    let service = at(&documents[0], "/services/aha");
    let user = with_defaults(text(service, "/user"));
    assert!(user.split(':').next().unwrap().parse::<u32>().is_ok_and(|id| id > 0), "{user} is root");
    assert_eq!(text(service, "/cap_drop/0"), "ALL");
    assert_eq!(at(service, "/read_only"), true);
    assert_eq!(at(service, "/init"), true);
    assert!(text(service, "/restart").starts_with("on-failure"), "a run that has ended is not started again");
    assert_eq!(at(service, "/ulimits/memlock"), -1);
    assert!(text(service, "/shm_size").ends_with("gb"));
    let known: Vec<PathBuf> = texts(service, "/tmpfs").iter().map(PathBuf::from).collect();
    assert_eq!(known, [PathBuf::from("/tmp")], "the rest of the file system is read-only");
}

#[test]
fn variables_take_their_defaults() {
    assert_eq!(with_defaults("${A:-x}/y${B:-../..}z"), "x/y../..z");
}
