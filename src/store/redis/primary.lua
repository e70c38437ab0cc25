-- A read-only replica refuses a script with flags by itself, unless the flags contain `no-writes`.
local function replica() end
