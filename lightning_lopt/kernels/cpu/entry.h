// What tensors.py calls, for a rule whose file includes this at its end: the file has defined Rule, Geometry, Work, Item
// and item_at.

extern "C" const int64_t layout[] = {sizeof(Rule), sizeof(Geometry)};

// Moves `count` tensors; with `measure` adds up the squares of each. `targets` are where steps are written that are to be
// added later, null for other tensors.
extern "C" int32_t move_tensors(const Rule* rule, void* const* addresses, const Real* scalars, double* squares,
                                const Geometry* geometries, int64_t count, Real* const* targets) {
  return outcome_of([&] {
    const Arguments given{addresses, scalars, squares, count, targets};
    std::vector<Item> items;
    items.reserve(count);
    for (int64_t i = 0; i < count; i++) items.push_back(item_at(*rule, given, geometries[i], i));
    step_all<Work>(*rule, items);
  });
}
