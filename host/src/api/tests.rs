use std::collections::BTreeSet;

use super::*;

#[test]
fn every_route_is_described_and_every_reference_resolves() {
    let document = openapi::document();
    for route in routes() {
        let found = &document["paths"][route.path][route.method.as_str().to_lowercase()];
        assert!(found["summary"].is_string(), "{} {}", route.method, route.path);
    }
    let text = document.to_string();
    let mut names = BTreeSet::new();
    for part in text.split("#/components/schemas/").skip(1) {
        names.insert(part.split('"').next().unwrap_or_default().to_owned());
    }
    assert!(names.contains("MigrateRequest"));
    for name in names {
        assert!(document["components"]["schemas"][&name]["type"].is_string(), "{name}");
    }
    let ids: Vec<_> = routes().iter().map(|route| format!("{} {}", route.method, route.path)).collect();
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len(), "a route is there twice");
}

#[test]
fn the_contract_of_the_reports_fields_is_kept() {
    let document = openapi::document();
    let fields = |name: &str| -> BTreeSet<String> {
        let properties = document["components"]["schemas"][name]["properties"].as_object();
        properties.into_iter().flatten().map(|(name, _)| name.clone()).collect()
    };
    let words = |text: &str| -> Vec<String> { text.split_whitespace().map(str::to_owned).collect() };
    for (name, wanted) in [
        (
            "MoveReport",
            "user from to mode outcome reason term total_ms blackout_ms gap_ms stall_ms clock_error_us rounds pages_sent \
             pages_at_switch bytes_wire bytes_raw faults fault_wait_ms forwarded_frames reordered_frames lost_frames \
             lost_pages replica_hit phases",
        ),
        ("LoginReply", "user vid address host state started_ms disk_missing_bytes disk_pulled_bytes"),
        ("ImageView", "user vid address host term state memory_bytes disk dirty_bytes replicas"),
        ("ScrubReport", "user checked_bytes corrupt_blocks repaired_blocks lost_blocks lost files"),
    ] {
        for word in words(wanted) {
            assert!(fields(name).contains(&word), "{name} lacks {word}");
        }
    }
}
